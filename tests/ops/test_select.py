"""The choice of a backend, without the devices."""

import dataclasses

import pytest

from lora_kernels.select import BACKENDS, choose

EVERY = frozenset(BACKENDS)


@pytest.mark.parametrize(
    "device, available, forced, want",
    (
        ("cpu", EVERY, None, "cpu"),
        ("cpu", {"reference"}, None, "reference"),
        ("cpu", {"reference", "sim"}, None, "reference"),
        ("cpu", {"reference", "triton", "cuda"}, None, "reference"),
        ("cuda", EVERY, None, "cuda"),
        ("cuda", {"reference", "triton"}, None, "triton"),
        ("cuda", {"reference", "cpu"}, None, "reference"),
        ("mps", EVERY, None, "reference"),
        ("cpu", EVERY, "reference", "reference"),
        ("cpu", EVERY, "sim", "sim"),
        ("cuda", EVERY, "triton", "triton"),
        ("mps", EVERY, "reference", "reference"),
        ("cpu", EVERY, "triton", None),
        ("cuda", EVERY, "cpu", None),
        ("cuda", EVERY, "sim", None),
        ("cpu", {"reference"}, "cpu", None),
        ("cuda", {"reference", "cuda"}, "triton", None),
        ("cpu", EVERY, "gpu", None),
    ),
)
def test_choice(device, available, forced, want):
    choice = choose(device, frozenset(available), forced)
    assert choice.backend == want
    assert choice.reason
    if want is None:
        assert repr(forced) in choice.reason


def test_reasons_tell_the_cases_apart():
    assert "does not run on cpu" in choose("cpu", EVERY, "cuda").reason
    assert "has no kernel" in choose("cpu", frozenset({"reference"}), "cpu").reason
    assert "there are reference, cpu" in choose("cpu", EVERY, "gpu").reason
    assert "no cpu kernel here" in choose("cpu", frozenset({"reference"})).reason
    assert "mps" in choose("mps", EVERY).reason


def test_a_choice_is_a_value():
    choice = choose("cpu", EVERY)
    assert choice == choose("cpu", EVERY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.backend = "cuda"
