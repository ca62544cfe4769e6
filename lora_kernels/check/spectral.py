"""The calls of the ``spectral`` family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lora_kernels as lk

from ..testing import (
    SPECTRAL_DTYPES,
    Sample,
    spectral_delta_expected,
    spectral_expected,
    spectral_gradients,
    spectral_location_expected,
    spectral_samples,
    spectral_upstream,
)
from .calls import Call, Family, Want, to

QUICK = (
    "no-rows", "all-ones", "two", "one-in", "one-row", "odd", "primes", "tall", "half-of-all", "base-28", "duplicates",
    "3d", "x-transposed", "m300",
)  # fmt: skip
#: Of fewer results in half precision the RMS error is a matter of luck.
FEWEST = 256


def _samples(dtypes: str, full: bool) -> list[Sample]:
    found = spectral_samples(*SPECTRAL_DTYPES[dtypes])
    return [s for s in found if full or s.name.partition("-")[2] in QUICK]


def _calls(sample: Sample) -> Iterator[Call]:
    def arguments(device: str) -> dict[str, Any]:
        a = sample.make(0)
        return {name: to(value, device) for name, value in a.items()} | {"plan": a["plan"].to(device)}

    def forward(device: str) -> dict[str, Tensor]:
        return {"y": lk.spectral_linear(**arguments(device))}

    def backward(device: str) -> dict[str, Tensor]:
        results = spectral_gradients(lk.spectral_linear, arguments(device), to(dy, device))
        return {name: results[name] for name in wants}

    def weight(device: str) -> dict[str, Tensor]:
        a = arguments(device)
        return {"W": lk.spectral_delta_weight(a["values"], a["plan"], kind=a["kind"], scale=a["scale"])}

    def places(device: str) -> dict[str, Tensor]:
        a = arguments(device)
        d = lk.spectral_location_grad(to(dy, device), a["x"], a["values"], a["plan"], scale=a["scale"])
        return dict(zip(("d_rows", "d_cols"), d, strict=True))

    a = sample.make(0)
    dy = spectral_upstream(a)
    wants = _measurable({name: Want(*want) for name, want in spectral_expected(sample).items()})
    if "y" in wants:
        yield Call("spectral_linear", forward, {"y": wants["y"]})
    yield Call("spectral_linear backward", backward, wants)
    made = _measurable({"W": Want(*spectral_delta_expected(sample))})
    if made:
        yield Call("spectral_delta_weight", weight, made)
    if a["kind"] == "dct":
        wants_of_places = {name: Want(*want) for name, want in spectral_location_expected(sample).items()}
        yield Call("spectral_location_grad", places, wants_of_places)


def _measurable(wants: dict[str, Want]) -> dict[str, Want]:
    return {
        name: want
        for name, want in wants.items()
        if want.plain.dtype == torch.float32 or want.plain.numel() >= FEWEST or not want.plain.numel()
    }


SPECTRAL = Family(
    tuple(SPECTRAL_DTYPES),
    ("spectral_linear", "spectral_linear backward", "spectral_delta_weight", "spectral_location_grad"),
    _samples,
    _calls,
)
