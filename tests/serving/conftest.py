import importlib.util
import sys
from pathlib import Path

import pytest
from skipping import skipped

sys.path.insert(0, str(Path(__file__).parent))


def missing():
    """Why these tests cannot run here."""
    return None if importlib.util.find_spec("vllm") else "needs vLLM, which `make test-vllm` installs"


def pytest_pycollect_makemodule(module_path, parent):
    return skipped(missing(), module_path, parent)


@pytest.fixture(scope="session")
def pair():
    """Two processes, with and without lora_kernels, for one engine after the other."""
    from remote import Pair

    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a small random Llama."""
    import llamas

    return llamas.tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adapters(tiny, tmp_path_factory):
    """{name: folder} of adapters of every kind for it."""
    import llamas

    return llamas.adapters(tiny, tmp_path_factory.mktemp("adapters"), llamas.KINDS | llamas.ENDS)


@pytest.fixture(scope="session")
def smol():
    """The folder of SmolLM2-135M-Instruct."""
    from lora_kernels.demo.model import bundled_model

    return bundled_model(False)
