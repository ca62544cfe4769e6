import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from skipping import skipped

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

not_interpreted = None  # why, where Triton's kernels cannot be interpreted in this process


def pytest_configure(config):
    global not_interpreted
    if importlib.util.find_spec("triton") is None:
        not_interpreted = "needs triton"
    elif alone(config):
        interpret()
    elif not interpreted():
        not_interpreted = "needs kernels that are not compiled: run this folder alone, or with TRITON_INTERPRET=1"


def alone(config):
    """Whether pytest was asked for tests of this folder only: nobody else in the process needs a compiled kernel."""
    paths = (config.invocation_params.dir / arg.partition("::")[0] for arg in config.args)
    return all(path.resolve().is_relative_to(HERE) for path in paths)


def interpret():
    """Must come before any module with kernels is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    if not interpreted():  # torch.utils.flop_counter has imported triton, whose own kernels chose to be compiled
        from triton import language

        for module in (language.standard, language.random, language):
            importlib.reload(module)


def interpreted():
    import triton

    return not isinstance(triton.language.sum, triton.JITFunction)


def pytest_pycollect_makemodule(module_path, parent):
    return skipped(not_interpreted, module_path, parent)


@pytest.fixture(autouse=True)
def guarded():
    """Every kernel a test of this folder launches is checked."""
    import guard

    with guard.installed():
        yield
