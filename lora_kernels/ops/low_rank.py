"""``low_rank``: y += s (x Aᵀ) Bᵀ for one LoRA adapter or many in one batch, forward and backward.

Shapes: M rows, K in, N out, R padded rank, L adapters, S slices, k adapters a row.

    x          [..., K]   fp32, bf16 or fp16; its rows are those of x.reshape(-1, K)
    y          [..., ΣN]  x's dtype or fp32
    A          [L, R, K]  x's dtype or fp32 (masters), any strides; a tuple of S of them where slices share x
                          (fused q/k/v, gate/up); or a list of L matrices [r_l, K], each with a rank of its own;
                          or packed, one [L, S * R, K] beside a tuple of B: slice s of an adapter with live rank r in
                          rows s * r to (s + 1) * r
    B          [L, N, R]  A's dtype; a tuple [L, N_s, R]; a list [N, r_l]
               Stacks may also have a size of 1 after L: [L, 1, R, K] and [L, 1, N, R].
    adapter_ids  int32 or int64 [M], -1 = no adapter; [M, k] with weights [M, k] fp32 for a mixture; or a BatchPlan
    scaling    s: a float, or fp32 [L] or [S, L]; default 1
    ranks      int32 [L] or [S, L]: the live rank; factors past it are not read; 0 = no adapter in that slice

Sums are held in fp32, x Aᵀ stays in fp32, y is rounded once, and a row's result does not depend on the other rows.
Source: Hu et al., LoRA (arXiv 2106.09685); Chen et al., Punica (arXiv 2310.18547) for BGMV and SGMV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ..plan import BatchPlan, lora_plan_
from ..reference import low_rank as reference
from . import _check
from ._autograd import note_backend, once_differentiable
from ._dispatch import Op, extension_error, forced_backend
from ._low_rank import lora_add_, lora_expand_, lora_grads, lora_shrink, out_features

Factors = Tensor | Sequence[Tensor]
_compiled, _on_gpu = extension_error is None, lora_add_.has_gpu_kernel()


def _call(op: Op, check: Callable[..., Any], first: Tensor, args: tuple) -> Any:
    """Run ``op``; bad arguments raise what ``check`` says of them.

    The compiled kernels check everything they read before they write, so there ``check`` only words their refusal. On a
    GPU what was checked once is not checked again.
    """
    if not is_compiling() and forced_backend() is None and isinstance(first, Tensor):
        if first.is_cpu and _compiled:
            try:
                if op.native is not None and op.native(*args):
                    return None
                return op.direct(*args)
            except RuntimeError:
                check(*args)
                raise
        if first.is_cuda and _on_gpu and op.repeat(args):
            return None
    check(*args)
    return op(*args)


def _write(op: Op, check: Callable[..., Any], args: tuple) -> Tensor:
    """:func:`_call` for an op that writes y, its first argument; returns y."""
    y = args[0]
    _call(op, check, y, args)
    if not is_compiling():
        increment_version(y)
    return y


def _factors(name: str, value: Factors) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return (value,) if value.dim() < 4 else (_stack(name, value),)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tensor or a tuple or list of tensors, got {type(value).__name__}")
    if value and isinstance(value[0], Tensor) and value[0].dim() == 4:
        return [_stack(name, t) for t in value]
    return value


def _stack(name: str, t: Any) -> Any:
    """[L, 1, R, K] as [L, R, K], a view."""
    if isinstance(t, Tensor) and t.dim() == 4:
        if t.shape[1] != 1:
            raise ValueError(f"{name} must have a size of 1 after L where it has four, got {_check.shape(t)}")
        return t.squeeze(1)
    return t


def _routing(adapter_ids: Tensor | BatchPlan) -> tuple[Tensor | None, Tensor | None]:
    """(ids, plan table) of either form."""
    if isinstance(adapter_ids, BatchPlan):
        return None, adapter_ids.table
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids must be a tensor or a BatchPlan, got {type(adapter_ids).__name__}")
    return adapter_ids, None


def _segments(seg_indptr: Any, adapter_ids: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(ids, seg_indptr, plan table) of either form."""
    if isinstance(seg_indptr, BatchPlan):
        if adapter_ids is not None:
            raise ValueError("a BatchPlan holds the adapter ids; pass no adapter_ids beside it")
        return None, None, seg_indptr.table
    _check.tensor("seg_indptr", seg_indptr)
    _check.tensor("adapter_ids", adapter_ids)
    return adapter_ids, seg_indptr, None


def _scaling(scaling: Any) -> tuple[float, Tensor | None]:
    if scaling is None:
        return 1.0, None
    if isinstance(scaling, Tensor):
        return 1.0, scaling
    if isinstance(scaling, (int, float)):
        return float(scaling), None
    raise TypeError(f"scaling must be a float or a float32 tensor [L] or [S, L], got {type(scaling).__name__}")


def _refuse_grad(name: str, instead: str, *tensors: Any) -> None:
    """In-place functions are not differentiable."""
    for t in tensors:
        for one in t if isinstance(t, (tuple, list)) else (t,):
            if isinstance(one, Tensor) and one.requires_grad:
                raise RuntimeError(
                    f"{name} works in place and is not differentiable, but one of its tensors requires grad: "
                    f"use lora_kernels.{instead}, or call it under torch.no_grad()"
                )


def bgmv(
    y: Tensor,
    x: Tensor,
    A: Factors,
    B: Factors,
    adapter_ids: Tensor | BatchPlan,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """y[m] += s · (x[m] Aᵀ) Bᵀ with the factors of adapter_ids[m], in place (BGMV).

    With ``adapter_ids [M, k]`` and ``weights [M, k]`` row m gets Σⱼ weights[m, j] times the term of adapter_ids[m, j].

    Args:
        y: [..., ΣN] x's dtype or fp32, written in place.
        x, A, B, adapter_ids, scaling, ranks, weights: see the module.

    Returns:
        y.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; y is untouched.
        IndexError: an id below -1 or not below L (on a GPU such a row gets no adapter).
        RuntimeError: grad mode is on and a tensor requires grad; use :func:`multi_lora`.
    """
    A, B = _factors("A", A), _factors("B", B)
    ids, plan = _routing(adapter_ids)
    scale, scaling = _scaling(scaling)
    if torch.is_grad_enabled():
        _refuse_grad("bgmv", "multi_lora", y, x, A, B, weights)
    return _write(lora_add_, _check.add, (y, x, A, B, ids, None, plan, scaling, ranks, weights, scale))


def sgmv(
    y: Tensor,
    x: Tensor,
    A: Factors,
    B: Factors,
    seg_indptr: Tensor | BatchPlan,
    adapter_ids: Tensor | None = None,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """y[m] += s · (x[m] Aᵀ) Bᵀ for the rows m of each segment, in place (SGMV).

    Rows ``seg_indptr[i]`` to ``seg_indptr[i + 1]`` use ``adapter_ids[i]``; rows past the last segment get no adapter.

    Args:
        seg_indptr: int32 or int64 [n_seg + 1], from 0, never falling; or a BatchPlan, and no ``adapter_ids``.
        adapter_ids: [n_seg], seg_indptr's dtype.
        y, x, A, B, scaling, ranks: see the module.

    Returns:
        y.

    Raises:
        As :func:`bgmv`.
    """
    A, B = _factors("A", A), _factors("B", B)
    ids, indptr, plan = _segments(seg_indptr, adapter_ids)
    scale, scaling = _scaling(scaling)
    if torch.is_grad_enabled():
        _refuse_grad("sgmv", "multi_lora", y, x, A, B)
    return _write(lora_add_, _check.add, (y, x, A, B, ids, indptr, plan, scaling, ranks, None, scale))


def bgmv_shrink(x: Tensor, A: Factors, adapter_ids: Tensor | BatchPlan, *, ranks: Tensor | None = None) -> Tensor:
    """v[s, m] = x[m] Aᵀ with slice s of adapter_ids[m].

    Returns:
        fp32 [S, M, R], unscaled, zero where the id is -1 and past the live rank.

    Raises:
        As :func:`bgmv`.
    """
    A = _factors("A", A)
    ids, plan = _routing(adapter_ids)
    if torch.is_grad_enabled():
        _refuse_grad("bgmv_shrink", "multi_lora", x, A)
    return _shrink(x, A, ids, None, plan, ranks)


def sgmv_shrink(
    x: Tensor,
    A: Factors,
    seg_indptr: Tensor | BatchPlan,
    adapter_ids: Tensor | None = None,
    *,
    ranks: Tensor | None = None,
) -> Tensor:
    """:func:`bgmv_shrink` by segments, as :func:`sgmv` takes them."""
    A = _factors("A", A)
    ids, indptr, plan = _segments(seg_indptr, adapter_ids)
    if torch.is_grad_enabled():
        _refuse_grad("sgmv_shrink", "multi_lora", x, A)
    return _shrink(x, A, ids, indptr, plan, ranks)


def _shrink(x, A, ids, indptr, plan, ranks, pairs=None) -> Tensor:
    _check.tensor("x", x)
    if pairs is None:
        pairs = x.shape[:-1].numel()
    return _call(lora_shrink, _check.shrink, x, (x, A, ids, indptr, plan, ranks, pairs))


def bgmv_expand(
    y: Tensor,
    v: Tensor,
    B: Factors,
    adapter_ids: Tensor | BatchPlan,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """y[m] += s · v[s, m] Bᵀ with slice s of adapter_ids[m], in place.

    Args:
        y: [..., ΣN] fp32, bf16 or fp16.
        v: fp32 [S, M, R], as :func:`bgmv_shrink` gives.
        B, adapter_ids, scaling, ranks: see the module.

    Returns:
        y.

    Raises:
        As :func:`bgmv`.
    """
    B = _factors("B", B)
    ids, plan = _routing(adapter_ids)
    if torch.is_grad_enabled():
        _refuse_grad("bgmv_expand", "multi_lora", y, v, B)
    scale, scaling = _scaling(scaling)
    return _write(lora_expand_, _check.expand, (y, v, B, ids, None, plan, scaling, ranks, None, scale))


def sgmv_expand(
    y: Tensor,
    v: Tensor,
    B: Factors,
    seg_indptr: Tensor | BatchPlan,
    adapter_ids: Tensor | None = None,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """:func:`bgmv_expand` by segments, as :func:`sgmv` takes them."""
    B = _factors("B", B)
    ids, indptr, plan = _segments(seg_indptr, adapter_ids)
    if torch.is_grad_enabled():
        _refuse_grad("sgmv_expand", "multi_lora", y, v, B)
    scale, scaling = _scaling(scaling)
    return _write(lora_expand_, _check.expand, (y, v, B, ids, indptr, plan, scaling, ranks, None, scale))


def multi_lora(
    x: Tensor,
    A: Factors,
    B: Factors,
    adapter_ids: Tensor | BatchPlan,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """(y or 0) + s · (x Aᵀ) Bᵀ row by row: :func:`bgmv` as a function, differentiable in x, A, B, y and weights.

    Args:
        y: [..., ΣN] to add to (x's dtype or fp32), unchanged; None = zeros in x's dtype.
        x, A, B, adapter_ids, scaling, ranks, weights: see the module.

    Returns:
        [..., ΣN]. Gradients never build ΔW, come in their tensor's dtype and are bitwise the same twice; those of
        factors past the live rank and of adapters without a row are zero.

    Raises:
        As :func:`bgmv`.
    """
    A, B = _factors("A", A), _factors("B", B)
    ids, plan = _routing(adapter_ids)
    scale, scaling = _scaling(scaling)
    return _multi_lora(x, A, B, ids, plan, scaling, ranks, weights, y, scale)


def _multi_lora(x, A, B, ids, plan, scaling, ranks, weights, y, scale) -> Tensor:
    _check.tensor("x", x)
    if y is None:
        _check.factors("B", B, x, "[L, N, R], or a tuple of those")
        y = x.new_zeros(*x.shape[:-1], out_features(B))
    else:
        _check.tensor("y", y)
        if not _needs_grad(y, x, weights, *A, *B):
            y = y.clone()
    args = (ids, None, plan, scaling, ranks, weights, scale)
    if _needs_grad(y, x, weights, *A, *B):
        if reference.is_packed(A, B):
            _check.add(y, x, A, B, *args)
            A = reference.unpacked(A[0], B, ranks)
        return _MultiLora.apply(y, x, weights, args, len(A), *A, *B)
    _call(lora_add_, _check.add, y, (y, x, A, B, *args))
    return y


def _needs_grad(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


class _MultiLora(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ; keeps x itself and the small v = x Aᵀ."""

    @staticmethod
    def forward(ctx, y, x, weights, args, count, *factors):
        A, B = factors[:count], factors[count:]
        ids, indptr, plan, scaling, ranks, _, scale = args
        _check.add(y, x, A, B, *args)
        if ids is not None:  # grouped once for all that follows
            L = reference.num_adapters(A)
            plan = torch.empty(3 + L + ids.numel(), dtype=torch.int32, device=ids.device)
            lora_plan_(plan, ids, None, L)
            ids = None
        pairs = x.shape[:-1].numel() * (1 if weights is None else weights.shape[1])
        v = lora_shrink(x, A, ids, indptr, plan, ranks, pairs)
        out = y.clone()
        lora_expand_(out, v, B, ids, indptr, plan, scaling, ranks, weights, scale)
        ctx.save_for_backward(x, weights, v, plan, scaling, ranks, *factors)
        ctx.count, ctx.scale = count, scale
        note_backend(ctx)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weights, v, plan, scaling, ranks, *factors = ctx.saved_tensors
        A, B = factors[: ctx.count], factors[ctx.count :]
        need_y, need_x, need_w, _, _, *need = ctx.needs_input_grad
        need = need_x, need_w, need[: ctx.count], need[ctx.count :]
        dx, dw, dA, dB = lora_backward(dy, x, None, A, B, v, plan, scaling, ranks, weights, ctx.scale, *need)
        return dy if need_y else None, dx, dw, None, None, *dA, *dB


def lora_backward(dy, x, weight, A, B, v, plan, scaling, ranks, weights, scale, need_x, need_w, need_A, need_B):
    """(dx, dweights, dA, dB) of y += x Wᵀ + s · w · (x Aᵀ) Bᵀ, None where not needed."""
    args = (dy, x, weight, A, B, v, plan, scaling, ranks, weights, scale)
    need = need_x, need_w, any(need_A), any(need_B)
    dx, dv, *grads = lora_grads(*args, *need)
    dA, dB = (grads[: len(A)], grads[len(A) :]) if need[2] else ([None] * len(A), grads)
    if not need[3]:
        dB = [None] * len(B)
    dw = None
    if need_w:
        dw = torch.zeros(v.shape[1], dtype=v.dtype, device=v.device)
        for s in range(v.shape[0]):
            of_pair = _pair_scaling(reference.of_slice(scaling, s), plan, reference.num_adapters(A), v)
            dw += (dv[s] * v[s]).sum(-1) * scale * of_pair
        dw = dw.view(weights.shape)
    return (
        dx if need_x else None,
        dw,
        [g if n else None for g, n in zip(dA, need_A, strict=True)],
        [g if n else None for g, n in zip(dB, need_B, strict=True)],
    )


def _pair_scaling(scaling: Tensor | None, plan: Tensor, L: int, v: Tensor) -> Tensor | float:
    """s of each pair, [P]; any value where a pair has no adapter, since v is zero there."""
    if scaling is None or not L:
        return 1.0
    bounds, order = plan[2 : L + 3].long(), plan[L + 3 :].long()
    position = torch.arange(order.shape[0], device=plan.device)
    adapter = (torch.searchsorted(bounds, position, right=True) - 1).clamp(0, L - 1)
    inside = position < bounds[-1]
    pairs = v.shape[1]
    out = v.new_zeros(pairs + 1)
    return out.index_copy(0, torch.where(inside, order, pairs), scaling[adapter].to(v.dtype))[:pairs]
