"""The calls of the ``quantized`` family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lora_kernels as lk

from ..testing import (
    QUANTIZED_DTYPES,
    Sample,
    dequantize_oracle,
    quantized_expected,
    quantized_gradients,
    quantized_name,
    quantized_samples,
    quantized_upstream,
)
from .calls import Call, Family, Want, to

QUICK = (
    "no-rows", "one-row", "one-row-int4", "one-row-multi", "m3", "m4-int8", "m8", "m17", "m64", "m65", "m129-int8",
    "group-of-3", "order", "order-dropout", "x-transposed", "3d", "live-ranks", "qkv", "packed", "listed",
    "mixture-of-3",
)  # fmt: skip
#: Of fewer results in half precision the RMS error is a matter of luck.
FEWEST = 256
FUNCTIONS = "quantized_linear", "quantized_lora_linear", "quantized_multi_lora_linear"


def _samples(dtypes: str, full: bool) -> list[Sample]:
    return [s for s in quantized_samples(*QUANTIZED_DTYPES[dtypes]) if full or s.name in QUICK]


def _calls(sample: Sample) -> Iterator[Call]:
    def arguments(device: str) -> dict[str, Any]:
        a = sample.make(0)
        return {name: to(value, device) for name, value in a.items()} | {"weight": a["weight"].to(device)}

    def unpacked(device: str) -> dict[str, Tensor]:
        return {"W": lk.dequantize(weight.to(device), dtype)}

    def forward(device: str) -> dict[str, Tensor]:
        return {"y": function(**arguments(device))}

    def backward(device: str) -> dict[str, Tensor]:
        results = quantized_gradients(function, arguments(device), to(dy, device))
        return {name: results[name] for name in wants}

    a = sample.make(0)
    weight, dtype, dy, name = a["weight"], a["x"].dtype, quantized_upstream(a), quantized_name(a)
    function = getattr(lk, name)
    yield Call("dequantize", unpacked, {"W": Want(dequantize_oracle(weight), dequantize_oracle(weight, dtype), 0.0)})
    wants = {
        n: Want(*want)
        for n, want in quantized_expected(sample).items()
        if want.plain.dtype == torch.float32 or want.plain.numel() >= FEWEST or not want.plain.numel()
    }
    if "y" in wants:
        yield Call(name, forward, {"y": wants["y"]})
    yield Call(f"{name} backward", backward, wants)


QUANTIZED = Family(
    tuple(QUANTIZED_DTYPES),
    ("dequantize", *(f"{name}{of}" for name in FUNCTIONS for of in ("", " backward"))),
    _samples,
    _calls,
)
