"""The registered ops of ``lora_linear``: schemas, fakes and FLOPs."""

from __future__ import annotations

import math

from torch import Tensor

from ..reference import lora_linear as reference
from ..reference.low_rank import accumulate_dtype
from ._dispatch import Op, one_device


def _fake_forward(y, x, A, B, column_scale, other, other_scale, bias, seed, p, scale):
    one_device(y, x, A, B, column_scale, other, other_scale, bias, seed)
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix a graph's number of rows
    return x.new_empty(rows, A.shape[0], dtype=accumulate_dtype(x.dtype))


def _fake_out_grads(dy, v, B, y, bias, column_scale, scale, need_v, need_B):
    one_device(dy, v, B, y, bias, column_scale)
    return (
        v.new_empty(v.shape if need_v else 0),
        v.new_empty(B.shape if need_B else 0),
        dy.new_empty(0 if column_scale is None else dy.shape),
        v.new_empty(0 if y is None else B.shape[0]),
    )


def _fake_in_grads(dx, dv, x, A, seed, p, scale):
    one_device(dx, dv, x, A, seed)
    return dv.new_empty(0 if x is None else A.shape)


def _fake_dropout(x, seed, p):
    one_device(x, seed)
    return x.new_empty(x.shape)


def _flops(rows: int, *products: Tensor | None) -> int:
    return sum(2 * rows * factor.numel() for factor in products if factor is not None)


lora_forward_ = Op(
    reference.lora_forward_,
    mutates=("y",),
    fake=_fake_forward,
    flops=lambda y, x, A, B, *rest, out_val=None, **kwargs: _flops(x.shape[:-1].numel(), A, B),
)
lora_out_grads = Op(
    reference.lora_out_grads,
    fake=_fake_out_grads,
    flops=lambda dy, v, B, *rest, out_val=None, **kwargs: _flops(v.shape[0], *([B] * sum(rest[-2:]))),
)
lora_in_grads_ = Op(
    reference.lora_in_grads_,
    mutates=("dx",),
    fake=_fake_in_grads,
    flops=lambda dx, dv, x, A, *rest, out_val=None, **kwargs: _flops(
        dv.shape[0], A if dx.numel() else None, None if x is None else A
    ),
)
lora_dropout = Op(reference.lora_dropout, fake=_fake_dropout)
