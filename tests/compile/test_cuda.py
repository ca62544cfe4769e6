"""Every shipped CUDA kernel, compiled for each architecture, within its limits and as the snapshot has it."""

import functools

import nvcc
import pytest
from cuda_limits import LIMITS
from snapshot import Snapshot

ARCHITECTURES = nvcc.supported(("sm_80", "sm_90", "sm_100"))


@functools.cache
def kernels(family, architecture):
    return nvcc.kernels(nvcc.compile_all(ARCHITECTURES)[family, architecture].result())


@pytest.fixture(params=sorted(LIMITS))
def family(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def test_every_source_has_limits():
    assert {*LIMITS} == nvcc.families()


def test_limits(family, architecture):
    fail_of(architecture, nvcc.faults(kernels(family, architecture), LIMITS[family]))


def test_snapshot(family, architecture, request):
    snapshot, found = Snapshot(f"cuda_{family}", nvcc.compiler()), kernels(family, architecture)
    if request.config.getoption("--update-snapshot", False):
        snapshot.update(architecture, found)
    elif not snapshot.comparable:
        pytest.skip(f"the snapshot is of {snapshot.written_with}, this is {snapshot.compiler}")
    fail_of(architecture, snapshot.differences(architecture, found))


def fail_of(architecture, lines):
    if lines:
        pytest.fail("\n".join([f"on {architecture}:", *lines]), pytrace=False)
