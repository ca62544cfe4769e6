"""Samples, oracle and yardstick of the ``transforms`` family."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference.hadamard import base, orders_of
from .low_rank import _laid_out
from .numerics import Sample

#: The dtypes of x, by name.
TRANSFORM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Case:
    """A sample before it has a dtype. ``rows`` are x's leading sizes."""

    name: str
    rows: tuple[int, ...]
    N: int
    transpose: bool = False
    layout: str = "auto"
    norm: str | None = "ortho"
    x: str = "dense"
    traits: tuple[str, ...] = ()


_CASES = (
    _Case("no-rows", (0,), 64),
    _Case("no-rows-3d", (3, 0), 96),
    _Case("vector", (), 128),
    _Case("length-1", (3,), 1, traits=("odd",)),
    _Case("length-2", (5,), 2),
    _Case("length-4", (33,), 4, norm=None),
    _Case("length-8", (1,), 8),
    _Case("length-16", (300,), 16),
    _Case("length-32", (7,), 32),
    _Case("length-64", (70,), 64, norm=None),
    _Case("length-128", (33,), 128),
    _Case("length-256", (9,), 256),
    _Case("length-512", (3,), 512),
    _Case("length-1024", (5,), 1024),
    _Case("length-2048", (2,), 2048),
    _Case("length-4096", (3,), 4096),
    _Case("length-8192", (1,), 8192, traits=("large",)),
    _Case("length-16384", (2,), 16384, traits=("large",)),
    _Case("length-32768", (1,), 32768, traits=("large",)),
    _Case("base-12", (5,), 12, traits=("odd",)),
    _Case("base-12-transposed", (5,), 24, transpose=True),
    _Case("base-20", (40,), 80, norm=None),
    _Case("base-20-transposed", (7,), 320, transpose=True),
    _Case("base-28", (9,), 56),
    _Case("base-28-transposed", (3,), 448, transpose=True),
    _Case("base-44", (60,), 88),
    _Case("base-44-transposed", (5,), 352, transpose=True),
    _Case("base-52", (3,), 416, transpose=True),
    _Case("base-76", (2,), 304),
    _Case("base-172", (3,), 344, transpose=True),
    _Case("bases-20-20", (3,), 400, traits=("odd",)),
    _Case("bases-12-28", (4,), 1344, transpose=True),
    _Case("bases-20-20-transposed", (3,), 800, transpose=True),
    _Case("bases-12-28-44", (1,), 29568, traits=("large",)),
    _Case("bases-12-44", (2,), 1056, transpose=True),
    _Case("3072", (2,), 3072),
    _Case("5120", (2,), 5120, transpose=True),
    _Case("14336", (2,), 14336, traits=("large",)),
    _Case("11008", (1,), 11008, transpose=True, traits=("large",)),
    _Case("13696", (1,), 13696, traits=("large",)),
    _Case("28672", (1,), 28672, traits=("large",)),
    _Case("29568", (1,), 29568, transpose=True, traits=("large",)),
    _Case("53248", (1,), 53248, traits=("large",)),
    _Case("base-36", (3,), 144, layout="quarot"),
    _Case("bases-2-20", (17,), 640, layout="quarot", transpose=True),
    _Case("base-108", (3,), 216, layout="quarot", transpose=True),
    _Case("base-140", (2,), 560, layout="quarot"),
    _Case("x-columns", (12,), 96, x="columns"),
    _Case("x-rows", (12,), 256, x="rows"),
    _Case("x-transposed", (35,), 80, x="transposed", transpose=True),
    _Case("x-expanded", (10,), 128, x="expanded"),
    _Case("x-3d", (3, 5), 64),
    _Case("x-3d-blocks", (3, 7), 56, x="blocks"),
    _Case("x-3d-swapped", (5, 4), 48, x="swapped", transpose=True),
    _Case("x-4d", (2, 3, 4), 56, x="blocks"),
)


def wht_samples(dtype: torch.dtype = torch.float32) -> list[Sample]:
    """The samples of ``wht`` in a dtype.

    Each makes ``x, norm, transpose, layout``. What lies between the rows of a strided x is NaN.

    Traits: ``strided``, ``large`` (rows of thousands), ``odd`` (a length that is an odd multiple of its bases' orders,
    which the CUDA kernel refuses).
    """
    return _samples(dtype)


@functools.cache
def _samples(dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(case.name, functools.partial(_make, case, dtype), frozenset(case.traits) | _strided(case))
        for case in _CASES
    ]


def _strided(case: _Case) -> set[str]:
    return set() if case.x == "dense" else {"strided"}


def _make(case: _Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = _laid_out((*case.rows, case.N), case.x, dtype, generator)
    return {"x": x, "norm": case.norm, "transpose": case.transpose, "layout": case.layout}


def sylvester(order: int) -> Tensor:
    """Sylvester's matrix in float64: entry (i, j) is -1 to the number of bits that i and j share."""
    index = torch.arange(order)
    shared, odd = index[:, None] & index, torch.zeros(order, order, dtype=torch.int64)
    while shared.any():
        odd ^= shared & 1
        shared = shared >> 1
    return 1.0 - 2.0 * odd.double()


def wht_factors(length: int, layout: str = "auto") -> list[Tensor]:
    """Dense float64 matrices whose Kronecker product is H of a length, none larger than 256 but for bases."""
    orders = orders_of(length, layout)
    factors, power = [base(order).double() for order in orders], length // math.prod(orders)
    while power > 1:
        factors.append(sylvester(min(power, 256)))
        power //= factors[-1].shape[0]
    return factors


def wht_oracle(x: Tensor, *, norm: str | None = "ortho", transpose: bool = False, layout: str = "auto") -> Tensor:
    """H x or Hᵀ x in float64 by dense products with H, or where that is large with its factors; differentiable."""
    return _by_products(x.double(), norm, transpose, layout)


def wht_plain(x: Tensor, *, norm: str | None = "ortho", transpose: bool = False, layout: str = "auto") -> Tensor:
    """The same in plain PyTorch: products in fp32, rounded to x's dtype once."""
    return _by_products(x.float(), norm, transpose, layout).to(x.dtype)


def _by_products(x: Tensor, norm: str | None, transpose: bool, layout: str) -> Tensor:
    N = x.shape[-1]
    factors = wht_factors(N, layout)
    if N <= 512:
        factors = [functools.reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float64))]
    y, inner = x.reshape(-1, N), N
    for H in factors:
        inner //= H.shape[0]
        H = (H.T if transpose else H).to(x)
        y = (H @ y.reshape(y.shape[0], N // inner // H.shape[0], H.shape[0], inner)).reshape(y.shape)
    return y.reshape(x.shape) * (1.0 if norm is None else N**-0.5)


def wht_noise(x: Tensor, *, norm: str | None = "ortho", **_: Any) -> float:
    """√N · 2⁻²⁴ of the norm of the terms that one output sums: what rounding costs an fp32 sum."""
    size = float(x.double().square().mean().sqrt()) if x.numel() else 0.0
    return x.shape[-1] ** 0.5 * 2**-24 * size * (1.0 if norm == "ortho" else x.shape[-1] ** 0.5)
