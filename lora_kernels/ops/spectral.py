"""``spectral``: y += x ΔWᵀ where ΔW = scale · K(S) is a transform of a sparse spectrum S, forward and backward.

The rows of x are transformed, multiplied by S's coefficients and transformed back, so that a step takes no memory of
ΔW's size and no time that grows with it. x is fp32, bf16 or fp16; sums are held in fp32 and the result is rounded once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ..reference.spectral import KINDS
from ..select import spectral_route
from ..spectral_plan import SpectralPlan
from . import _check
from ._autograd import note_backend, once_differentiable
from ._spectral import spectral_add_, spectral_linear_grads, spectral_weight_grad
from ._spectral import spectral_delta_weight as delta_weight_op
from ._spectral import spectral_linear as linear_op
from .quantized import _autocast, _autocasts

Kind = Literal["fourier", "dct", "hartley", "identity", "wht", "haar"]


def spectral_linear(
    x: Tensor, values: Tensor, plan: SpectralPlan, *, kind: Kind, scale: float = 1.0, y: Tensor | None = None
) -> Tensor:
    """(y or 0) + x ΔWᵀ with ΔW = scale · K(S), S [N, K] the spectrum with values[i] at (plan.rows[i], plan.cols[i]).

    K(S) is, with C the orthonormal DCT-II, Q the orthonormal Hartley transform and H the Walsh-Hadamard transform with
    entries ±1/√K: fourier Re(ifft2(S)); dct C_Nᵀ S C_K; hartley Q_N S Q_K; identity S; wht S H_K; haar one level of
    pywt's ``idwt2((TL, (TR, BL, BR)), "db1")`` of S's quadrants, which odd sizes split at the ceiling, and crop.

    Args:
        x: [..., K], fp32, bf16 or fp16, any strides.
        values: [n], in x's dtype or float32.
        plan: the places of the values, of shape (N, K), on x's device.
        kind: K.
        scale: PEFT's ``scaling`` for FourierFT (fourier) and WaveFT (haar), α for LoCA (dct), α/√(N K) for QWHA (wht).
        y: [..., N] in x's dtype or float32, or None.

    Returns:
        [..., N] in y's dtype, or x's without one, contiguous; differentiable in x, values and y.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: one of the wrong shape or on another device; an unknown kind; or kind "wht" where no Hadamard matrix
            of order K is constructed here.

    Under autocast x is cast as for torch's own linear, and values in fp32 stay as they are.

    Source: Gao et al., FourierFT (arXiv 2405.03003); Du et al., LoCA (arXiv 2502.06820); Bilican et al., WaveFT (arXiv
    2505.12532); QWHA (arXiv 2509.17428).
    """
    if _autocasts(x):
        return _autocast(spectral_linear, x, values, plan, kind=kind, scale=scale, y=y)
    _check_call(x, values, plan, kind, scale)
    N = plan.shape[0]
    if y is not None:
        _check.floating("y", y)
        _check.same_device("y", y, x)
        if y.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"y must be {x.dtype} or float32, got {y.dtype}")
        if y.shape != (*x.shape[:-1], N):
            raise ValueError(f"y must be {[*x.shape[:-1], N]}, got {_check.shape(y)}")
    if spectral_route(x.shape[:-1].numel(), plan.n, plan.shape, kind, x.device.type) == "weight":
        weight = spectral_delta_weight(values, plan, kind=kind, scale=scale)  # fp32 values are not rounded to x's dtype
        delta = torch.nn.functional.linear(x.to(weight.dtype), weight)
        return (delta.to(x.dtype) if y is None else (y + delta).to(y.dtype)).contiguous()
    by_row, by_column = plan.entries(kind)
    given = x, values, y, by_row, by_column, *plan.hadamard(kind), kind, N, float(scale)
    if torch.is_grad_enabled() and (x.requires_grad or values.requires_grad or (y is not None and y.requires_grad)):
        return _SpectralLinear.apply(*given)
    return linear_op(x, values, by_row, y, *given[5:])


class _SpectralLinear(torch.autograd.Function):
    """Keeps x and the values: nothing that is transformed."""

    @staticmethod
    def forward(ctx: Any, x, values, y, by_row, by_column, signs, orders, kind, N, scale):
        ctx.save_for_backward(x, values, by_row, by_column, signs)
        ctx.rest = orders, kind, scale
        ctx.dtype = None if y is None else y.dtype
        note_backend(ctx)
        return linear_op(x, values, by_row, y, signs, orders, kind, N, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):
        x, values, by_row, by_column, signs = ctx.saved_tensors
        needs_dx, needs_dvalues, needs_dy = ctx.needs_input_grad[:3]
        dx, dvalues = spectral_linear_grads(dy, x, values, by_row, by_column, signs, *ctx.rest, needs_dx, needs_dvalues)
        return (
            dx if needs_dx else None,
            dvalues.to(values.dtype) if needs_dvalues else None,
            dy if needs_dy else None,
            *(None,) * 7,
        )


def bgmv_spectral(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    plan: SpectralPlan,
    adapter_ids: Tensor,
    *,
    kind: Kind,
    scaling: float | Tensor | None = None,
) -> Tensor:
    """y += x ΔW_lᵀ in place for each row of x, l = adapter_ids of the row: many spectral adapters in one batch.

    ΔW_l = scaling_l · K(S_l), with values[l] at the plan's places, which the adapters share, as those of one seed do.
    Both transforms are of the whole batch.

    Args:
        y: [..., N], x's dtype or float32.
        x: [..., K], fp32, bf16 or fp16.
        values: [L, n], in x's dtype or float32.
        plan, kind: as :func:`spectral_linear` takes them.
        adapter_ids: int32 or int64 [M]; -1 = no adapter, which leaves the row of y as it is.
        scaling: a float, or fp32 [L]; default 1.

    Returns:
        y. Not differentiable: use :func:`spectral_linear` for an adapter that is trained.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, before y is written.
        IndexError: an id out of range, on the CPU.
        RuntimeError: gradients are on and an argument requires one.
    """
    _check.tensor("values", values)
    if values.dim() != 2:
        raise ValueError(f"values must be [L, n], got {_check.shape(values)}")
    _check_call(x, values[0] if values.shape[0] else values.new_empty(values.shape[1]), plan, kind, 1.0)
    L, rows = values.shape[0], x.shape[:-1].numel()
    _check.ids(adapter_ids, "adapter_ids", L)
    _check.same_device("adapter_ids", adapter_ids, x)
    if adapter_ids.shape != (rows,):
        raise ValueError(f"adapter_ids must be [{rows}], one for each row of x, got {_check.shape(adapter_ids)}")
    _check.output(y, rows, plan.shape[0], x, (x.dtype, torch.float32))
    scale, each = 1.0, None
    if isinstance(scaling, Tensor):
        each = scaling
        if each.shape != (L,) or each.dtype != torch.float32 or each.device != x.device:
            raise ValueError(f"scaling must be float32 [{L}] on {x.device}, got {each.dtype} {_check.shape(each)}")
    elif scaling is not None:
        scale = float(scaling)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, values)):
        raise RuntimeError("bgmv_spectral is not differentiable: use spectral_linear, or torch.no_grad")
    spectral_add_(y, x, values, plan.entries(kind)[0], adapter_ids, each, *plan.hadamard(kind), kind, scale)
    if not is_compiling():
        increment_version(y)
    return y


def spectral_delta_weight(
    values: Tensor, plan: SpectralPlan, *, kind: Kind, scale: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """ΔW = scale · K(S), dense: what :func:`spectral_linear` multiplies by, for merging.

    Args:
        values, plan, kind, scale: as :func:`spectral_linear` takes them.
        dtype: of the result; default that of values.

    Returns:
        [N, K], differentiable in values.

    Raises: as :func:`spectral_linear`.
    """
    _check_values(values, plan, kind, scale)
    dtype = values.dtype if dtype is None else dtype
    if dtype not in (*_check.FLOATS, torch.float64):
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    given = values, plan.entries(kind)[0], *plan.hadamard(kind), kind, *plan.shape, float(scale), dtype
    if torch.is_grad_enabled() and values.requires_grad:
        return _DeltaWeight.apply(*given)
    return delta_weight_op(*given)


class _DeltaWeight(torch.autograd.Function):
    """The gradient of each value is read off the transformed gradient of ΔW."""

    @staticmethod
    def forward(ctx: Any, values, by_row, signs, orders, kind, N, K, scale, dtype):
        ctx.save_for_backward(by_row, signs)
        ctx.rest, ctx.dtype = (orders, kind, values.shape[0], scale), values.dtype
        note_backend(ctx)
        return delta_weight_op(values, by_row, signs, orders, kind, N, K, scale, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight):
        return spectral_weight_grad(dweight, *ctx.saved_tensors, *ctx.rest).to(ctx.dtype), *(None,) * 8


def spectral_location_grad(
    dy: Tensor, x: Tensor, values: Tensor, plan: SpectralPlan, *, kind: Literal["dct"] = "dct", scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """LoCA's gradients of the places: d_rows_i = clamp(½ values_i (D[p + 1, q] - D[p - 1, q]), -1, 1) at value i's
    place (p, q), and d_cols_i the same along q, with D[p, q] = scale · Σ (C_N dy)_p (C_K x)_q over all rows of x.

    D is the gradient that a coefficient at (p, q) would have. A neighbour outside of S is taken at its edge. The clamp
    comes after the sum over the rows given here: where rows are spread over processes, add up before.

    Args:
        dy: [..., N], the gradient of y, in x's dtype or float32.
        x, values, plan, scale: as :func:`spectral_linear` takes them.
        kind: "dct", the only one whose places have neighbours between which something can be interpolated.

    Returns:
        fp32 [n] twice; not differentiable.

    Raises: as :func:`spectral_linear`.

    Source: Du et al., LoCA (arXiv 2502.06820), its central difference.
    """
    if kind != "dct":
        raise ValueError(f"kind must be 'dct', got {kind!r}")
    _check_call(x, values, plan, kind, scale)
    N, K = plan.shape
    _check.floating("dy", dy)
    _check.same_device("dy", dy, x)
    if dy.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"dy must be {x.dtype} or float32, got {dy.dtype}")
    if dy.shape != (*x.shape[:-1], N):
        raise ValueError(f"dy must be {[*x.shape[:-1], N]}, got {_check.shape(dy)}")
    p, q = plan.rows, plan.cols
    rows = torch.cat(((p + 1).clamp(max=N - 1), (p - 1).clamp(min=0), p, p))
    cols = torch.cat((q, q, (q + 1).clamp(max=K - 1), (q - 1).clamp(min=0)))
    around = SpectralPlan(rows, cols, shape=plan.shape)
    with torch.no_grad():
        ones = values.new_ones(rows.shape[0], dtype=torch.float32)
        _, D = spectral_linear_grads(dy, x, ones, *around.ordered(kind), None, (), kind, float(scale), False, True)
        below, above, right, left = D.view(4, -1)
        half = values.to(D.dtype) / 2
        return (half * (below - above)).clamp(-1, 1), (half * (right - left)).clamp(-1, 1)


def _check_values(values: Any, plan: Any, kind: Any, scale: Any) -> None:
    if not isinstance(plan, SpectralPlan):
        raise TypeError(f"plan must be a SpectralPlan, got {type(plan).__name__}")
    _check.floating("values", values)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}")
    if values.shape != (plan.n,):
        raise ValueError(f"values must be [{plan.n}], one for each place of the plan, got {_check.shape(values)}")
    if plan.device != values.device:
        raise ValueError(f"the plan is on {plan.device}, values on {values.device}")


def _check_call(x: Any, values: Any, plan: Any, kind: Any, scale: Any) -> None:
    _check.floating("x", x)
    _check_values(values, plan, kind, scale)
    _check.same_device("values", values, x)
    if values.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"values must be {x.dtype} or float32, got {values.dtype}")
    if x.dim() == 0 or x.shape[-1] != plan.shape[1]:
        raise ValueError(f"x must be [..., {plan.shape[1]}], the plan's columns, got {_check.shape(x)}")
