"""The registered ops of ``quantized``: schemas, fakes and FLOPs."""

from __future__ import annotations

import math

from torch import Tensor

from ..reference import quantized as reference
from . import _quantized_panels as panels
from ._dispatch import Op, one_device


def _new_linear(x, codes, scales, offsets, table, group, bias, v, B, *routing):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _new_grad(dy, codes, scales, offsets, table, group, in_features, v, A, scale):
    return dy.new_empty((*dy.shape[:-1], in_features))


def _flops(rows: int, N: int, K: int, v: Tensor | None) -> int:
    return 2 * rows * N * K + (0 if v is None else 2 * v.shape[-2] * v.shape[-1] * N)


dequantize_ = Op(
    reference.dequantize_,
    mutates=("out",),
    fake=one_device,
)
quantized_linear = Op(
    reference.quantized_linear,
    new=_new_linear,
    cpu=panels.quantized_linear,
    flops=lambda x, codes, *rest, out_val=None, **kwargs: _flops(
        math.prod(x.shape[:-1]), codes.shape[0], x.shape[-1], rest[5]
    ),
)
quantized_linear_grad = Op(
    reference.quantized_linear_grad,
    new=_new_grad,
    cpu=panels.quantized_linear_grad,
    flops=lambda dy, codes, *rest, out_val=None, **kwargs: _flops(
        math.prod(dy.shape[:-1]), rest[4], codes.shape[0], rest[5]
    ),
)
