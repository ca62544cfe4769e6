"""When vLLM is left alone, and what is said."""

import inside
import pytest
from remote import Remote


@pytest.fixture(scope="module")
def remote():
    remote = Remote(VLLM_PLUGINS="none")
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def found(remote):
    """What a process finds after each registration, in this order."""
    return remote(inside.registrations)


def test_switched_off(found):
    wrapper, _, warnings = found["switched off"]
    assert wrapper == "PunicaWrapperCPU"
    assert warnings == []


def test_an_unknown_version_is_left_alone_and_told_once(found):
    assert found["unknown version"][:2] == found["switched off"][:2]
    (warning,) = found["unknown version"][2]
    assert "its version 1.7.0 is not one of" in warning
    assert found["unknown version again"] == found["unknown version"]


def test_without_kernels_it_is_left_alone(found):
    assert found["no kernels"][:2] == found["switched off"][:2]
    _, warning = found["no kernels"][2]
    assert "the compiled CPU kernels are missing: no such file" in warning


def test_a_second_registration_changes_nothing(found):
    wrapper, parts, warnings = found["on"]
    assert wrapper == "LoRAKernelsCPU"
    assert all(a != b for a, b in zip(parts, found["switched off"][1], strict=True))
    assert warnings == found["no kernels"][2]
    assert found["on again"] == found["on"]


def test_on_cuda_it_is_the_class_for_gpus(found, remote):
    assert remote(inside.on_cuda) == ["PunicaWrapperGPU", "LoRAKernelsGPU"]
