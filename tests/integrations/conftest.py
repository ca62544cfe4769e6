import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from counting import calls  # noqa: F401


@pytest.fixture
def unforced(monkeypatch):
    """As users call it, with or without the extension: a graph only names its ops."""
    from lora_kernels.integrations import _peft_forward
    from lora_kernels.ops import _dispatch

    monkeypatch.setattr(_peft_forward, "_compiled", True)
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
