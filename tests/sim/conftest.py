import importlib
import sys
from pathlib import Path

import pytest
from skipping import skipped

sys.path.insert(0, str(Path(__file__).parent))

not_built = None  # why, where CUDA's kernels cannot be run on the host


def pytest_configure(config):
    global not_built
    try:
        importlib.import_module("lora_kernels._sim")
    except ImportError as error:
        not_built = f"needs lora_kernels._sim, which csrc/sim/build.py builds: {error}"


def pytest_pycollect_makemodule(module_path, parent):
    return skipped(not_built, module_path, parent)


@pytest.fixture(autouse=True)
def in_turn():
    """Threads in order, whatever the test before asked for."""
    from lora_kernels import _sim

    _sim.set_seed(0)


@pytest.fixture(params=range(5), ids="seed{}".format)
def seed(request):
    """Threads in order, and in each kind of disorder."""
    from lora_kernels import _sim

    _sim.set_seed(request.param)
    return request.param
