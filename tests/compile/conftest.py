import importlib.util
import sys
from pathlib import Path

import pytest
from skipping import skipped

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

CUDA = ("test_cuda.py", "test_nvcc.py")
not_compiled = None  # why, where Triton's kernels cannot be compiled in this process


def pytest_addoption(parser):
    parser.addoption("--update-snapshot", action="store_true", help="write the resources of compiled kernels anew")


def pytest_configure(config):
    global not_compiled
    if importlib.util.find_spec("triton") is None:
        not_compiled = "needs triton"
        return
    import triton

    if not isinstance(triton.language.sum, triton.JITFunction):
        not_compiled = "needs kernels that are not interpreted: run this folder without TRITON_INTERPRET"


def pytest_pycollect_makemodule(module_path, parent):
    return skipped(no_cuda() if module_path.name in CUDA else not_compiled, module_path, parent)


def no_cuda():
    """Why CUDA sources cannot be compiled here, or None."""
    if importlib.util.find_spec("setuptools") is None:
        return "needs setuptools, whose setup.py says how they are compiled"
    return importlib.import_module("nvcc").missing()


@pytest.fixture(scope="session", autouse=True)
def triton_cache(request):
    """Triton's cache knows a source's lines but not its path, which resources are read from: each checkout has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
        yield
