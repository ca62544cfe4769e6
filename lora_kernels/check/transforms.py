"""The calls of the ``transforms`` family."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import lora_kernels as lk

from ..testing import (
    TRANSFORM_DTYPES,
    TRANSFORM_FUNCTIONS,
    Sample,
    transform_noise,
    transform_oracle,
    transform_plain,
    transform_samples,
    transform_upstream,
)
from .calls import Call, Family, Want


def _samples(dtypes: str, full: bool) -> list[Sample]:
    return [
        Sample(f"{function} {s.name}", functools.partial(_make, function, s), s.traits)
        for function in TRANSFORM_FUNCTIONS
        for s in transform_samples(function, TRANSFORM_DTYPES[dtypes])
        if "odd" not in s.traits and (full or not s.traits)
    ]


def _make(function: str, sample: Sample, seed: int) -> dict:
    return {"function": function, **sample.make(seed)}


def _calls(sample: Sample) -> Iterator[Call]:
    a = sample.make(0)
    x, function = a.pop("x"), a.pop("function")
    dy, call = transform_upstream(x), getattr(lk, function)

    def forward(device: str) -> dict[str, Tensor]:
        return {"y": call(x.to(device), **a)}

    def backward(device: str) -> dict[str, Tensor]:
        leaf = x.to(device).detach().requires_grad_()
        with torch.enable_grad():
            y = call(leaf, **a)
        return {"dx": torch.autograd.grad(y, leaf, dy.to(device))[0]}

    yield Call(function, forward, {"y": _want(function, x, a, False)})
    yield Call(f"{function} backward", backward, {"dx": _want(function, dy, a, True)})


def _want(function: str, x: Tensor, a: dict, adjoint: bool) -> Want:
    oracle, plain = (make(function, x, adjoint=adjoint, **a) for make in (transform_oracle, transform_plain))
    return Want(oracle, plain, transform_noise(function, x, **a))


TRANSFORMS = Family(
    tuple(TRANSFORM_DTYPES),
    tuple(f"{function}{part}" for function in TRANSFORM_FUNCTIONS for part in ("", " backward")),
    _samples,
    _calls,
)
