import sys
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import _dispatch
from lora_kernels.testing import poison, threads

sys.path.insert(0, str(Path(__file__).parent))  # for what several folders share
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


def need_extension():
    if _dispatch.extension_error is not None:
        pytest.skip(f"needs the compiled extension lora_kernels._C: {_dispatch.extension_error}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN. A module whose tests must see torch as users do overrides this fixture."""
    with poison():
        yield


@pytest.fixture(autouse=True)
def one_thread(request):
    """The small tensors of the op tests gain nothing from threads; the tests of threading ask for theirs."""
    if request.path.parent.name not in ("ops", "reference"):
        yield
        return
    with threads(1):
        yield


def force(name):
    if name == "cpu":
        need_extension()
    return lk.backend(name)


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    """Each backend for CPU tensors, forced."""
    with force(request.param):
        yield request.param


@pytest.fixture
def cpu_backend():
    """The compiled kernels, forced."""
    with force("cpu"):
        yield


@pytest.fixture(params=("unforced", "reference", "cpu"))
def route(request):
    """Each way a call can take: as users call it, and each backend forced."""
    if request.param == "unforced":
        yield request.param
        return
    with force(request.param):
        yield request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """The compiled kernels, forced, in each instruction set this machine has."""
    need_extension()
    ops = torch.ops.lora_kernels_C
    if request.param not in ops.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = ops.get_isa()
    ops.set_isa(request.param)
    with lk.backend("cpu"):
        yield request.param
    ops.set_isa(before)
