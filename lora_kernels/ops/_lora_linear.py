"""The registered ops of ``lora_linear``: schemas, room for their results, and FLOPs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..reference import lora_linear as reference
from ..reference.low_rank import accumulate_dtype
from ._dispatch import Op


def _new_down(x, A, seed, p):
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix a graph's number of rows
    return x.new_empty((rows, A.shape[0]), dtype=accumulate_dtype(x.dtype))


def _new_forward(y, x, A, B, column_scale, other, other_scale, bias, seed, p, scale):
    return _new_down(x, A, seed, p)


def _new_out_grads(dy, v, B, y, bias, column_scale, scale, need_v, need_B):
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format) if need_v else _nothing(v),
        v.new_empty(B.shape) if need_B else _nothing(v),
        _nothing(dy) if column_scale is None else torch.empty_like(dy, memory_format=torch.contiguous_format),
        _nothing(v) if y is None else v.new_empty(B.shape[0]),
    )


def _new_in_grads(dx, dv, x, A, seed, p, scale):
    return _nothing(dv) if x is None else dv.new_empty(A.shape)


def _new_weight_norm(weight, A, B, weight_norm_sq, scale):
    return weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))


def _new_dropout(x, seed, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_NOTHING = {
    dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def _nothing(like):
    """No elements of a tensor's kind: nobody writes to them, so plain ones share a tensor."""
    shared = _NOTHING.get(like.dtype) if type(like) is Tensor and like.is_cpu and not is_compiling() else None
    return like.new_empty(0) if shared is None else shared


def _flops(rows: int, *products: Tensor | None) -> int:
    return sum(2 * rows * factor.numel() for factor in products if factor is not None)


lora_down = Op(
    reference.lora_down,
    new=_new_down,
    flops=lambda x, A, *rest, out_val=None, **kwargs: _flops(x.shape[:-1].numel(), A),
)
lora_forward_ = Op(
    reference.lora_forward_,
    mutates=("y",),
    new=_new_forward,
    flops=lambda y, x, A, B, *rest, out_val=None, **kwargs: _flops(x.shape[:-1].numel(), A, B),
)
lora_out_grads = Op(
    reference.lora_out_grads,
    new=_new_out_grads,
    flops=lambda dy, v, B, *rest, out_val=None, **kwargs: _flops(v.shape[0], *([B] * sum(rest[-2:]))),
)
lora_in_grads_ = Op(
    reference.lora_in_grads_,
    mutates=("dx",),
    new=_new_in_grads,
    flops=lambda dx, dv, x, A, *rest, out_val=None, **kwargs: _flops(
        dv.shape[0], A if dx.numel() else None, None if x is None else A
    ),
)
lora_dropout = Op(reference.lora_dropout, new=_new_dropout)
lora_weight_norm = Op(
    reference.lora_weight_norm,
    new=_new_weight_norm,
    flops=lambda weight, A, B, *rest, out_val=None, **kwargs: _flops(weight.shape[0], A) + _flops(A.shape[0], A, B),
)
