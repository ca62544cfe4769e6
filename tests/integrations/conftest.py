import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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


@pytest.fixture
def unforced(monkeypatch):
    """As users call it, with or without the extension: a graph only names its ops."""
    from lora_kernels.integrations import _peft_layer
    from lora_kernels.ops import _dispatch

    monkeypatch.setattr(_peft_layer, "_compiled", True)
    token = _dispatch._forced.set(None)
    yield
    _dispatch._forced.reset(token)


@pytest.fixture
def a_backend():
    """The compiled kernels, or the reference by force: unforced it would leave every layer to PEFT."""
    import lora_kernels as lk
    from lora_kernels.ops import _dispatch

    if _dispatch.extension_error is None:
        yield
    else:
        with lk.backend("reference"):
            yield
