"""The calls of the ``transforms`` family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lora_kernels as lk

from ..testing import TRANSFORM_DTYPES, Sample, wht_noise, wht_oracle, wht_plain, wht_samples
from .calls import Call, Family, Want


def _samples(dtypes: str, full: bool) -> list[Sample]:
    return [s for s in wht_samples(TRANSFORM_DTYPES[dtypes]) if not s.traits & {"odd"} and (full or not s.traits)]


def _calls(sample: Sample) -> Iterator[Call]:
    a = sample.make(0)
    x = a.pop("x")
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    back = {**a, "transpose": not a["transpose"]}

    def forward(device: str) -> dict[str, Tensor]:
        return {"y": lk.wht(x.to(device), **a)}

    def backward(device: str) -> dict[str, Tensor]:
        leaf = x.to(device).detach().requires_grad_()
        with torch.enable_grad():
            y = lk.wht(leaf, **a)
        return {"dx": torch.autograd.grad(y, leaf, dy.to(device))[0]}

    yield Call("wht", forward, {"y": Want(wht_oracle(x, **a), wht_plain(x, **a), wht_noise(x, **a))})
    yield Call(
        "wht backward", backward, {"dx": Want(wht_oracle(dy, **back), wht_plain(dy, **back), wht_noise(dy, **a))}
    )


TRANSFORMS = Family(tuple(TRANSFORM_DTYPES), ("wht", "wht backward"), _samples, _calls)
