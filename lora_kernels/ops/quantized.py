"""``quantized``: linear layers whose weight is packed in 4 or 8 bits, with LoRA in the same sum, forward and backward.

x is fp32, bf16 or fp16 with any leading axes and any strides; sums are held in fp32 and each result is rounded once.
The weight is never unpacked as a whole.

Sources: Dettmers et al., QLoRA (arXiv 2305.14314); Frantar et al., GPTQ (arXiv 2210.17323); Lin et al., AWQ
(arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..plan import BatchPlan
from ..quantization.weight import QuantizedWeight
from ..reference.dropout import keep_scale
from ..reference.low_rank import accumulate_dtype, is_packed, unpacked
from . import _check
from ._autograd import applied, note_backend, once_differentiable
from ._dispatch import extension, forced_backend
from ._lora_linear import lora_down, lora_in_grads_, lora_out_grads
from ._low_rank import lora_shrink
from ._quantized import dequantize_, quantized_linear_grad
from ._quantized import quantized_linear as linear
from .lora_linear import _any_autocast, _cast, _check_pair, _column_sums, _dropout, _vector
from .low_rank import Factors, _factors, _multi_lora, _needs_grad, _routing, _scaling


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """W [N, K], each number rounded once: bitsandbytes' bits for its formats.

    Args:
        weight: packed.
        dtype: fp32, bf16 or fp16; the weight's own where None.

    Raises:
        TypeError: no packed weight, or another dtype.
    """
    _weight(weight)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in _check.FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    out = weight.scales.new_empty(weight.shape, dtype=dtype)
    dequantize_(out, *weight.packed, 0, 0)
    return out if weight.order is None else torch.empty_like(out).index_copy_(1, weight.order, out)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias with W packed; differentiable in x and bias.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        weight: of shape (N, K), on x's device.
        bias: [N] x's dtype or fp32.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    y = _at_once(x, weight, bias, (), (), None, None, None, None, None, 1.0)
    if y is not None:
        return y
    if _autocasts(x):
        return _autocast(quantized_linear, x, weight, bias)
    _check_linear(x, weight, bias)
    if _needs_grad(x, bias):
        return _apply(x, *weight.packed, weight.order, bias, 1.0, None, None, None, 0.0)
    return linear(_ordered(x, weight.order), *weight.packed, bias, *_NO_ADAPTER)


def quantized_lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + s (x̃ Aᵀ) Bᵀ, x̃ = dropout(x), with W packed; differentiable in x, A, B and bias.

    Kept for the backward pass are x itself, x̃ Aᵀ and a seed, and only what a gradient asks for.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        weight: of shape (N, K), on x's device.
        A, B: [R, K] and [N, R], x's dtype or fp32 (masters, used at full precision), any strides.
        scaling: s, a float.
        bias, dropout, training, seed: as :func:`lora_kernels.lora_linear` takes them.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    scale, per_adapter = _scaling(scaling)
    if per_adapter is not None:
        raise TypeError("quantized_lora_linear takes one adapter: scaling must be a float")
    if type(dropout) is float and 0 <= dropout <= 1 and (not training or not dropout) and seed is None:
        y = _at_once(x, weight, bias, (A,), (B,), None, None, None, None, None, scale)
        if y is not None:
            return y
    if _autocasts(x):
        return _autocast(
            quantized_lora_linear, x, weight, A, B, scaling=scaling, bias=bias, dropout=dropout, training=training,
            seed=seed,
        )  # fmt: skip
    _check_linear(x, weight, bias)
    _check_pair(x, A, B, *weight.shape)
    p, seed = _dropout(dropout, training, seed, x)
    if _needs_grad(x, A, B, bias):
        return _apply(x, *weight.packed, weight.order, bias, scale, A, B, seed, p)
    v = lora_down(x, A, seed, p)
    return linear(
        _ordered(x, weight.order), *weight.packed, bias, v[None], [B], None, None, None, None, None, None,
        scale * keep_scale(p),
    )  # fmt: skip


def quantized_multi_lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    A: Factors,
    B: Factors,
    adapter_ids: Tensor | BatchPlan,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ with an adapter of its own for each row, or a mixture; W packed.

    Differentiable in x, A, B, bias and weights; with gradients the base is rounded before the adapters are added.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        weight: of shape (N, K), on x's device.
        A, B, adapter_ids, scaling, ranks, weights: as :func:`lora_kernels.multi_lora` takes them, B's N together the
            weight's.
        bias: [N] x's dtype or fp32.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong type, dtype, shape or device, an id out of range.
    """
    A, B = _factors("A", A), _factors("B", B)
    ids, plan = _routing(adapter_ids)
    scale, scaling = _scaling(scaling)
    y = _at_once(x, weight, bias, A, B, ids, plan, scaling, ranks, weights, scale)
    if y is not None:
        return y
    if _autocasts(x):
        return _autocast(
            quantized_multi_lora_linear, x, weight, A, B, adapter_ids, scaling=scale if scaling is None else scaling,
            ranks=ranks, weights=weights, bias=bias,
        )  # fmt: skip
    _check_linear(x, weight, bias)
    rows, N = _check.adapters(x, A, B, ids, None, plan, scaling, ranks, weights)
    if weight.shape[0] != N:
        raise ValueError(f"B must have {weight.shape[0]} out features as the weight, got {N}")
    if _needs_grad(x, bias, weights, *A, *B):
        y = quantized_linear(x, weight, bias)
        return _multi_lora(x, A, B, ids, plan, scaling, ranks, weights, y, scale)
    if is_packed(A, B):
        A = unpacked(A[0], B, ranks)
    pairs = rows * (1 if weights is None else weights.shape[1])
    v = lora_shrink(x, A, ids, None, plan, ranks, pairs)
    return linear(
        _ordered(x, weight.order), *weight.packed, bias, v, B, ids, None, plan, scaling, ranks, weights, scale
    )


class _Quantized(torch.autograd.Function):
    """x Wᵀ + bias + s (x̃ Aᵀ) Bᵀ with W packed and frozen; A and B may both be None."""

    @staticmethod
    def forward(ctx, x, codes, scales, offsets, table, group, order, bias, scale, A, B, seed, p):
        v, adapter, scale = None, _NO_ADAPTER, scale * keep_scale(p)
        if A is not None:
            v = lora_down(x, A, seed, p)
            adapter = v[None], [B], None, None, None, None, None, None, scale
        y = linear(_ordered(x, order), codes, scales, offsets, table, group, bias, *adapter)
        need_x, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 9, 10))
        base = codes, scales, offsets, table, order
        ctx.save_for_backward(
            *(base if need_x else (None,) * 5),
            x if need_A else None,
            v if need_B else None,
            A if need_x or need_A else None,
            B if need_x or need_A or need_B else None,
            seed,
        )
        ctx.group, ctx.scale, ctx.p, ctx.K = group, scale, p, x.shape[-1]
        ctx.rank = 0 if A is None else A.shape[0]
        ctx.bias_dtype = None if bias is None else bias.dtype
        note_backend(ctx)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        codes, scales, offsets, table, order, x, v, A, B, seed = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 7, 9, 10))
        dx = dA = dB = dv = None
        if B is not None:
            if v is None:
                v = dy.new_empty(dy.shape[:-1].numel(), ctx.rank, dtype=accumulate_dtype(dy.dtype))
            dv, dB, _, _ = lora_out_grads(dy, v, B, None, None, None, ctx.scale, need_x or need_A, need_B)
            dB = dB.to(B.dtype) if need_B else None
        if need_x:
            fused = A is not None and seed is None
            dx = quantized_linear_grad(
                dy, codes, scales, offsets, table, ctx.group, ctx.K,
                dv if fused else None, _ordered(A, order) if fused else None, ctx.scale,
            )  # fmt: skip
            if order is not None:
                dx = torch.empty_like(dx).index_copy_(dx.dim() - 1, order, dx)
        masked = need_x and seed is not None
        if need_A or (masked and A is not None):
            step = dx if masked else dy.new_empty(0)
            dA = lora_in_grads_(step, dv, x if need_A else None, A, seed, ctx.p, ctx.scale)
            dA = dA.to(A.dtype) if need_A else None
        dbias = _column_sums(dy).to(ctx.bias_dtype) if need_bias else None
        return dx, None, None, None, None, None, None, dbias, None, dA, dB, None, None


_apply = applied(_Quantized)

#: v to scale of the op, where there is no adapter.
_NO_ADAPTER: tuple = (None, [], None, None, None, None, None, None, 1.0)


_native = getattr(extension, "quantized_lora_linear", None)


def _at_once(x: Any, weight: Any, bias: Any, A: Any, B: Any, ids, plan, scaling, ranks, weights, scale) -> Any:
    """y where the compiled kernels take the call as it is, which they check; else None, with nothing done."""
    if _native is None or is_compiling() or forced_backend() is not None or type(weight) is not QuantizedWeight:
        return None
    if weight.order is not None or _needs_grad(x, bias, weights, *A, *B):
        return None
    try:
        return _native(x, *weight.packed, bias, A, B, ids, plan, scaling, ranks, weights, scale)
    except (RuntimeError, TypeError):
        return None  # the checks say what is wrong


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """Columns as the codes have them."""
    return x if order is None else x.index_select(x.dim() - 1, order)


def _autocasts(x: Any) -> bool:
    return _any_autocast() and isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)


def _autocast(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
    """``function`` of tensors cast as autocast casts them for linear layers; fp32 but for x stays as it is."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(cast(entry) for entry in value)
        return _cast(value, dtype, _check.FLOATS[1:])

    with torch.autocast(x.device.type, enabled=False):
        x = _cast(x, dtype, _check.FLOATS)
        return function(x, *map(cast, args), **{name: cast(value) for name, value in options.items()})


def _weight(weight: Any) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight must be a QuantizedWeight, got {type(weight).__name__}")


def _check_linear(x: Any, weight: Any, bias: Any) -> None:
    _check.floating("x", x)
    _weight(weight)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for a weight of shape ({N}, {K}), got {_check.shape(x)}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}")
    if bias is not None:
        _vector("bias", bias, N, x)
