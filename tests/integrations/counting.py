"""Whether patched layers ran fast."""

import pytest


@pytest.fixture
def calls(monkeypatch):
    """Counts of the patched layers' calls: ``fast`` ones, and ``slow`` ones that ran PEFT's own forward."""
    return count(monkeypatch)


def count(monkeypatch):
    """The counts, until the patching is undone."""
    from lora_kernels.integrations import _peft_layer, _peft_relatives_layer, _peft_spectral_layer

    counts = Calls()
    inner, repeat, relative = _peft_layer._forward, _peft_layer.repeat, _peft_relatives_layer._forward

    def repeated(*args):
        y = repeat(*args)
        counts.fast += y is not None
        return y

    def counting(run):
        def counted(*args):
            try:
                y = run(*args)
            except (RuntimeError, TypeError, ValueError, KeyError):
                counts.slow += 1
                raise
            counts.fast += y is not None
            counts.slow += y is None
            return y

        return counted

    monkeypatch.setattr(_peft_layer, "_forward", counting(inner))
    monkeypatch.setattr(_peft_layer, "repeat", repeated)
    monkeypatch.setattr(_peft_relatives_layer, "_forward", counting(relative))
    monkeypatch.setattr(_peft_spectral_layer, "_forward", counting(_peft_spectral_layer._forward))
    return counts


class Calls:
    fast = slow = 0

    def take(self):
        """(fast, slow) since the last time."""
        taken = self.fast, self.slow
        self.fast = self.slow = 0
        return taken
