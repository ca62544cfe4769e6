"""The registered ops of ``low_rank``: schemas, fakes, FLOPs, and the gradients made of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import low_rank as reference
from ..select import cuda_is_faster, outgrows_cuda
from ._dispatch import Op, gpu, one_device

# What a CUDA kernel takes as it is:
LISTED_MOST = 64  # matrices
DIMS_MOST = 8


def out_features(B: Sequence[Tensor]) -> int:
    """ΣN of factors in any form."""
    return sum(b.shape[1] for b in B) if B[0].dim() == 3 else B[0].shape[0]


def _flops(x_rows: int, in_features: int, out_features: int, rank: int) -> int:
    return 2 * x_rows * rank * (in_features + out_features)


def _cuda_refuses_factors(factors: Sequence[Tensor], *others: Tensor | None) -> str | None:
    if any(t is not None and t.dtype == torch.float64 for t in (factors[0], *others)):
        return "fp64"
    if any(t is not None and t.dim() > DIMS_MOST for t in others):
        return f"tensors of more than {DIMS_MOST} dimensions"
    if len(factors) > LISTED_MOST:
        return f"lists of more than {LISTED_MOST} factors"
    return None


def _cuda_refuses_shrink(x: Tensor, A: Sequence[Tensor], *_: Any) -> str | None:
    if x.dtype == torch.float32 and A[0].dtype not in (torch.float32, torch.float64):
        return "16-bit factors of fp32 rows"
    return _cuda_refuses_factors(A, x)


def _cuda_refuses_expand(
    y: Tensor, v: Tensor, B: Sequence[Tensor], ids: Any, indptr: Any, plan: Any, scaling: Any, ranks: Any,
    weights: Tensor | None, scale: float,
) -> str | None:  # fmt: skip
    if torch.float32 not in (y.dtype, B[0].dtype) and y.dtype != B[0].dtype:
        return f"{B[0].dtype} factors of a {y.dtype} y"
    rank = max(b.shape[-1] for b in B)
    if outgrows_cuda(rank, B[0].dtype, gpu(y.device)):
        return f"{B[0].dtype} factors of rank {rank} on a GPU with this little shared memory"
    return _cuda_refuses_factors(B, y, weights)


def _cuda_refuses_add(y: Tensor, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], *rest: Any) -> str | None:
    return _cuda_refuses_shrink(x, A) or _cuda_refuses_expand(y, x, B, *rest)


def _prefers_cuda(x: Tensor, factors: Sequence[Tensor], *_: Any) -> bool:
    return cuda_is_faster(factors[0].dtype, gpu(x.device))


def _fake_shrink(x, A, ids, indptr, plan, ranks, pairs):
    one_device(x, A, ids, indptr, plan, ranks)
    return x.new_empty(
        reference.num_slices(A), pairs, reference.padded_rank(A), dtype=reference.accumulate_dtype(x.dtype)
    )


def _fake_outer(u, w, num_adapters, ids, indptr, plan, scaling, weights, scale, pairs):
    one_device(u, w, ids, indptr, plan, scaling, weights)
    dtype = reference.accumulate_dtype(torch.promote_types(u.dtype, w.dtype))
    return u.new_empty(num_adapters, u.shape[-1], w.shape[-1], dtype=dtype)


lora_add_ = Op(
    reference.lora_add_,
    mutates=("y",),
    fake=one_device,
    cuda_refuses=_cuda_refuses_add,
    prefers_cuda=lambda y, *rest: _prefers_cuda(*rest),
    flops=lambda y, x, A, B, *rest, out_val=None, **kwargs: _flops(
        x.shape[:-1].numel() * (1 if rest[5] is None else rest[5].shape[1]),
        x.shape[-1] * reference.num_slices(B),
        out_features(B),
        max(b.shape[-1] for b in B),
    ),
)
lora_shrink = Op(
    reference.lora_shrink,
    fake=_fake_shrink,
    cuda_refuses=_cuda_refuses_shrink,
    prefers_cuda=_prefers_cuda,
    flops=lambda x, A, *rest, out_val=None, **kwargs: _flops(
        out_val.shape[1], x.shape[-1] * out_val.shape[0], 0, out_val.shape[2]
    ),
)
lora_expand_ = Op(
    reference.lora_expand_,
    mutates=("y",),
    fake=one_device,
    cuda_refuses=_cuda_refuses_expand,
    prefers_cuda=lambda y, *rest: _prefers_cuda(*rest),
    flops=lambda y, v, B, *rest, out_val=None, **kwargs: _flops(v.shape[1], 0, out_features(B), v.shape[2]),
)
lora_outer = Op(
    reference.lora_outer,
    fake=_fake_outer,
    flops=lambda u, w, *rest, out_val=None, **kwargs: 2 * rest[-1] * u.shape[-1] * w.shape[-1],
)


def _lora_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    v: Tensor,
    plan: Tensor | None,
    scaling: Tensor | None,
    ranks: Tensor | None,
    weights: Tensor | None,
    scale: float,
    need_x: bool,
    need_v: bool,
    need_A: bool,
    need_B: bool,
) -> list[Tensor]:
    """The gradients of y += x Wᵀ + s · w · v Bᵀ, v = x Aᵀ, in terms of the other ops.

    dv = dy B, dx = dy W + s w dv A, dA = s w dvᵀ x, dB = s w dyᵀ v.

    Returns:
        [dx, dv, *dA, *dB]: dx and dv empty where not needed, no dA and no dB where not needed.
    """
    stacked = A[0].dim() == 3
    slices = [([a], [b]) for a, b in zip(A, B, strict=True)] if stacked else [(A, B)]
    route = (None, None, plan)
    pairs, L = v.shape[1], reference.num_adapters(A)
    dx = x.new_empty(0)
    if need_x:
        dx = torch.matmul(dy, weight) if weight is not None else x.new_zeros(x.shape)
        dx = dx.float() if len(slices) > 1 else dx  # rounded once
    dv = torch.empty_like(v) if need_v else v.new_empty(0)
    dA: list[Tensor] = []
    dB: list[Tensor] = []
    start = 0
    for s, (a, b) in enumerate(slices):
        width = b[0].shape[-2]
        g = dy[..., start : start + width]
        start += width
        scaled, live = reference.of_slice(scaling, s), reference.of_slice(ranks, s)
        if need_x or need_v or need_A:
            dv_s = lora_shrink(g, [t.mT for t in b], *route, live, pairs)
        if need_x:
            lora_expand_(dx, dv_s, [t.mT for t in a], *route, scaled, live, weights, scale)
        if need_v:
            dv[s] = dv_s[0]
        if need_A:
            dA += _of_factors(a, lora_outer(dv_s[0], x, L, *route, scaled, weights, scale, pairs), False)
        if need_B:
            dB += _of_factors(b, lora_outer(g, v[s], L, *route, scaled, weights, scale, pairs), True)
    return [dx.to(x.dtype), dv, *dA, *dB]


def _of_factors(factors: Sequence[Tensor], grad: Tensor, is_B: bool) -> list[Tensor]:
    """The gradient [L, U, W] of one slice as its factors' own: their shapes, in their dtype, none a view of another."""
    dtype = factors[0].dtype
    if factors[0].dim() == 3:
        return [grad.to(dtype)]
    if len(factors) == 1:
        return [grad[0].to(dtype)]
    parts = [g[:, : t.shape[1]] if is_B else g[: t.shape[0]] for g, t in zip(grad, factors, strict=True)]
    return [g.to(dtype, memory_format=torch.contiguous_format, copy=True) for g in parts]


def _fake_grads(dy, x, weight, A, B, v, plan, scaling, ranks, weights, scale, need_x, need_v, need_A, need_B):
    one_device(dy, x, weight, A, B, v, plan, scaling, ranks, weights)
    return [
        x.new_empty(x.shape if need_x else 0),
        v.new_empty(v.shape if need_v else 0),
        *(t.new_empty(t.shape) for factors, needed in ((A, need_A), (B, need_B)) if needed for t in factors),
    ]


def _flops_of_grads(
    dy, x, weight, A, B, v, plan, scaling, ranks, weights, scale, need_x, need_v, need_A, need_B, *, out_val=None
):  # fmt: skip
    through_A, through_B = (
        v.shape[0] * x.shape[-1] * (need_x + need_A),
        dy.shape[-1] * (need_B + (need_x or need_v or need_A)),
    )
    base = 2 * dy.numel() * x.shape[-1] if need_x and weight is not None else 0
    return base + _flops(v.shape[1], through_A, through_B, v.shape[2])


lora_grads = Op(_lora_grads, composite=True, fake=_fake_grads, flops=_flops_of_grads)
