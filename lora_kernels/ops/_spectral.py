"""The registered ops of ``spectral``: schemas, fakes and FLOPs."""

from __future__ import annotations

import math

from torch import Tensor

from ..reference import spectral as reference
from ..reference.low_rank import accumulate_dtype
from . import _transforms
from ._dispatch import Op, one_device
from ._transforms import compiled

#: Floating-point operations a number of a row that a transform takes: a fast Fourier transform's, of a power of two.
_PER_NUMBER = {"fourier": 2.5, "dct": 2.5, "hartley": 2.5, "wht": 1.0}


def _transform_flops(kind: str, length: int) -> int:
    return int(_PER_NUMBER.get(kind, 0.0) * length * math.log2(max(length, 2)))


def _entries(by_row: Tensor, kind: str, N: int) -> int:
    return (by_row.shape[0] - reference.length_of(kind, N) - 1) // 2


def _fake_linear(x, values, by_row, y, signs, orders, kind, out_features, scale):
    one_device(x, values, by_row, y, signs)
    return x.new_empty((*x.shape[:-1], out_features), dtype=None if y is None else y.dtype)


def _flops_of_linear(x, values, by_row, y, signs, orders, kind, N, scale, *, out_val=None):
    rows, two = math.prod(x.shape[:-1]), kind != "wht"
    return rows * (
        _transform_flops(kind, x.shape[-1]) + two * _transform_flops(kind, N) + 2 * _entries(by_row, kind, N)
    )


def _fake_grads(dy, x, values, by_row, by_column, signs, orders, kind, scale, needs_dx, needs_dvalues):
    one_device(dy, x, values, by_row, by_column, signs)
    return (
        x.new_empty(x.shape if needs_dx else 0),
        x.new_empty(values.shape if needs_dvalues else 0, dtype=accumulate_dtype(x.dtype)),
    )


def _flops_of_grads(dy, x, values, by_row, by_column, signs, orders, kind, scale, needs_dx, needs_dv, *, out_val=None):
    rows, N, two = math.prod(x.shape[:-1]), dy.shape[-1], kind != "wht"
    transforms = two * _transform_flops(kind, N) + (needs_dx + needs_dv) * _transform_flops(kind, x.shape[-1])
    return rows * (transforms + (needs_dx + needs_dv) * 2 * _entries(by_row, kind, N))


def _fake_delta_weight(values, by_row, signs, orders, kind, out_features, in_features, scale, dtype):
    one_device(values, by_row, signs)
    return values.new_empty((out_features, in_features), dtype=dtype)


def _fake_weight_grad(dweight, by_row, signs, orders, kind, count, scale):
    one_device(dweight, by_row, signs)
    return dweight.new_empty(count, dtype=accumulate_dtype(dweight.dtype))


spectral_linear = Op(
    reference.spectral_linear, fake=_fake_linear, cpu=compiled(reference.spectral_linear), flops=_flops_of_linear
)
spectral_add_ = Op(
    reference.spectral_add_,
    mutates=("y",),
    fake=one_device,
    cpu=compiled(reference.spectral_add_),
    flops=lambda y, x, values, by_row, ids, scaling, signs, orders, kind, scale, *, out_val=None: _flops_of_linear(
        x, values, by_row, y, signs, orders, kind, y.shape[-1], scale
    ),
)
spectral_linear_grads = Op(
    reference.spectral_linear_grads,
    fake=_fake_grads,
    cpu=compiled(reference.spectral_linear_grads),
    flops=_flops_of_grads,
)


def delta_weight(values, by_row, signs, orders, kind, out_features, in_features, scale, dtype):
    """ΔW by the transforms' ops."""
    T = reference.Transforms(kind, signs, orders, _transforms)
    acc = accumulate_dtype(dtype)
    return reference.delta_weight(T, values, by_row, out_features, in_features, scale, acc).to(dtype)


def weight_grad(dweight, by_row, signs, orders, kind, count, scale):
    """The gradient of ΔW's values by the transforms' ops."""
    return reference.weight_grad(reference.Transforms(kind, signs, orders, _transforms), dweight, by_row, count, scale)


spectral_delta_weight = Op(reference.spectral_delta_weight, fake=_fake_delta_weight, cpu=delta_weight)
spectral_weight_grad = Op(reference.spectral_weight_grad, fake=_fake_weight_grad, cpu=weight_grad)
