"""The calls of the ``lora_linear`` family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lora_kernels as lk

from ..testing import (
    LORA_LINEAR_DTYPES,
    Sample,
    lora_linear_expected,
    lora_linear_gradients,
    lora_linear_samples,
    lora_linear_upstream,
)
from .calls import Call, Family, Want, to

QUICK = (
    "no-rows", "one-row", "m65", "m129-dora-dropout", "r100", "every-scale", "3d-dora", "x-transposed", "dora-core",
    "dora-zero", "weight-transposed",
)  # fmt: skip


def _samples(dtypes: str, full: bool) -> list[Sample]:
    samples = [s for s in lora_linear_samples(*LORA_LINEAR_DTYPES[dtypes]) if full or s.name in QUICK]
    # An RMS over a few rounding errors is a matter of luck.
    return [s for s in samples if LORA_LINEAR_DTYPES[dtypes].x == torch.float32 or "few" not in s.traits]


def _calls(sample: Sample) -> Iterator[Call]:
    dy = lora_linear_upstream(sample.make(0))
    wants = {name: Want(*want) for name, want in lora_linear_expected(sample).items()}
    y = wants.pop("y")

    def forward(device: str) -> dict[str, Tensor]:
        return {"y": lk.lora_linear(**{name: to(value, device) for name, value in sample.make(0).items()})}

    def backward(device: str) -> dict[str, Tensor]:
        a = {name: to(value, device) for name, value in sample.make(0).items()}
        results = lora_linear_gradients(lk.lora_linear, a, to(dy, device))
        return {name: results[name] for name in wants}

    yield Call("lora_linear", forward, {"y": y})
    yield Call("lora_linear backward", backward, wants)


LORA_LINEAR = Family(tuple(LORA_LINEAR_DTYPES), ("lora_linear", "lora_linear backward"), _samples, _calls)
