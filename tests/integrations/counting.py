"""Whether patched layers ran fast."""

import pytest


@pytest.fixture
def calls(monkeypatch):
    """Counts of the patched layers' calls: ``fast`` ones, and ``slow`` ones that ran PEFT's own forward."""
    from lora_kernels.integrations import _peft_layer

    counts = Calls()
    inner, repeat = _peft_layer._forward, _peft_layer.repeat

    def repeated(*args):
        y = repeat(*args)
        counts.fast += y is not None
        return y

    def counted(layer, x, names):
        try:
            y = inner(layer, x, names)
        except (RuntimeError, TypeError, ValueError, KeyError):
            counts.slow += 1
            raise
        counts.fast += y is not None
        counts.slow += y is None
        return y

    monkeypatch.setattr(_peft_layer, "_forward", counted)
    monkeypatch.setattr(_peft_layer, "repeat", repeated)
    return counts


class Calls:
    fast = slow = 0

    def take(self):
        """(fast, slow) since the last time."""
        taken = self.fast, self.slow
        self.fast = self.slow = 0
        return taken
