"""What a format's tensors must be, said in words a user can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import _check
from ..ops._check import FLOATS, shape

__all__ = ["FLOATS", "expect", "finite", "only", "shape"]


def only(tensors: Mapping[str, Any], needed: Iterable[str], optional: Iterable[str], prefix: str, what: str) -> None:
    """Every tensor that ``what`` needs, and none that it does not know."""
    missing = [prefix + name for name in needed if tensors.get(name) is None]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    extra = [prefix + name for name in tensors if name not in {*needed, *optional}]
    if extra:
        raise ValueError(f"{what} has no {', '.join(extra)}")


def expect(name: str, t: Any, dtypes: tuple[torch.dtype, ...], sizes: tuple[int | str, ...], why: str = "") -> None:
    """A tensor of one of the dtypes and of these sizes; a letter stands for any."""
    _check.tensor(name, t)
    if t.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} {shape(t)} must be {names}, got {t.dtype}")
    if t.dim() != len(sizes) or any(isinstance(n, int) and n != m for n, m in zip(sizes, t.shape, strict=True)):
        expected = "[" + ", ".join(map(str, sizes)) + "]"
        raise ValueError(f"{name} must be {expected}{why}, got {shape(t)}")


def finite(name: str, t: Tensor) -> None:
    """No NaN and no infinity, where looking costs no synchronisation."""
    if _check.readable(t):
        wrong = (~t.isfinite()).nonzero()
        if wrong.numel():
            at = wrong[0].tolist()
            raise ValueError(f"{name} {shape(t)} must be finite, got {t[tuple(at)].item()} at {at}")
