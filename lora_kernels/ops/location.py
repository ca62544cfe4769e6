"""``spectral_linear`` as a function of where its coefficients stand, for methods that learn the places."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..spectral_plan import SpectralPlan
from . import _check
from ._autograd import note_backend, once_differentiable
from ._spectral import spectral_linear_grads
from .spectral import spectral_linear, spectral_location_grad


def spectral_linear_located(
    x: Tensor,
    values: Tensor,
    rows: Tensor,
    cols: Tensor,
    plan: SpectralPlan,
    *,
    kind: Literal["dct"] = "dct",
    scale: float = 1.0,
    y: Tensor | None = None,
) -> Tensor:
    """(y or 0) + x ΔWᵀ as :func:`lora_kernels.spectral_linear` has it, with gradients of places in place of values'.

    The result is that of ``plan``; the gradients of rows and cols are :func:`lora_kernels.spectral_location_grad`.

    Args:
        x, values, plan, scale, y: as ``spectral_linear`` takes them; values get no gradient.
        rows, cols: float32 [n], positions of which the plan's places are the nearest; only their gradients are used.
        kind: "dct".

    Returns:
        [..., N], differentiable in x, rows, cols and y.

    Raises: as ``spectral_linear``.

    Source: Du et al., LoCA (arXiv 2502.06820).
    """
    if kind != "dct":
        raise ValueError(f"kind must be 'dct', got {kind!r}")
    for name, positions in (("rows", rows), ("cols", cols)):
        _check.floating(name, positions)
        if positions.shape != values.shape:
            raise ValueError(f"{name} must be [{values.shape[0]}] as values, got {_check.shape(positions)}")
    if not (torch.is_grad_enabled() and (rows.requires_grad or cols.requires_grad)):
        return spectral_linear(x, values.detach(), plan, kind=kind, scale=scale, y=y)
    return _Located.apply(x, values.detach(), rows, cols, y, plan, kind, float(scale))


class _Located(torch.autograd.Function):
    """Keeps x and the values."""

    @staticmethod
    def forward(ctx: Any, x, values, rows, cols, y, plan, kind, scale):
        ctx.save_for_backward(x, values)
        ctx.plan, ctx.kind, ctx.scale = plan, kind, scale
        ctx.dtypes = rows.dtype, cols.dtype
        note_backend(ctx)
        return spectral_linear(x, values, plan, kind=kind, scale=scale, y=y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):
        x, values = ctx.saved_tensors
        needs_dx, _, *needs_places, needs_dy = ctx.needs_input_grad[:5]
        dx, d_rows, d_cols = None, None, None
        if needs_dx:
            entries = ctx.plan.entries(ctx.kind)
            dx, _ = spectral_linear_grads(dy, x, values, *entries, None, (), ctx.kind, ctx.scale, True, False)
        if any(needs_places):
            d_rows, d_cols = spectral_location_grad(dy, x, values, ctx.plan, kind=ctx.kind, scale=ctx.scale)
            d_rows, d_cols = (t.to(dtype) for t, dtype in zip((d_rows, d_cols), ctx.dtypes, strict=True))
        return dx, None, d_rows, d_cols, dy if needs_dy else None, None, None, None
