"""``lora_linear``: a frozen linear layer with one LoRA adapter, forward and backward.

Source: Hu et al., LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import linear

from . import _check
from ._dispatch import extension, forced_backend, under
from ._low_rank import lora_add_, lora_expand_, lora_shrink
from .low_rank import _call, _needs_grad, _scaling, lora_backward


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | None = None,
    core: Tensor | None = None,
    in_scale: Tensor | None = None,
    delta_in_scale: Tensor | None = None,
    delta_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    magnitude: Tensor | None = None,
    weight_norm_sq: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ: a frozen linear layer with one LoRA adapter.

    Differentiable in x, A, B and bias; the weight is taken as frozen.

    Args:
        x: [..., K] fp32, bf16 or fp16.
        weight: [N, K] x's dtype, not requiring grad.
        A, B: [R, K] and [N, R], x's dtype or fp32 (masters), any strides.
        scaling: s, a float.
        bias: [N] x's dtype.
        dropout, training, seed: not supported yet; ``dropout`` with ``training`` raises.
        core, in_scale, delta_in_scale, delta_scale, out_scale, magnitude, weight_norm_sq: not supported yet; each
            raises.

    Returns:
        [..., N] in x's dtype.

    Raises:
        NotImplementedError: one of the arguments not supported yet was given.
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    none_given = core is in_scale is delta_in_scale is delta_scale is out_scale is magnitude is weight_norm_sq is None
    if not none_given or (dropout and training):
        given = dict(
            core=core, in_scale=in_scale, delta_in_scale=delta_in_scale, delta_scale=delta_scale, out_scale=out_scale,
            magnitude=magnitude, weight_norm_sq=weight_norm_sq,
        )  # fmt: skip
        name = next((name for name, value in given.items() if value is not None), "dropout")
        raise NotImplementedError(f"lora_linear does not support {name} yet")
    scale, per_adapter = _scaling(scaling)
    if per_adapter is not None:
        raise TypeError("lora_linear takes one adapter: scaling must be a float")
    if (
        bias is None
        and not is_compiling()
        and not torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and isinstance(A, Tensor)
        and isinstance(B, Tensor)
        and weight.dim() == A.dim() == B.dim() == 2
        and x.is_cpu
        and weight.is_cpu
        and weight.dtype is x.dtype
    ):
        # Of what is left to refuse, torch and the kernels refuse all; the check then words it.
        try:
            if extension is not None and forced_backend() is None:
                y = extension.lora_linear(x, weight, None, (A,), (B,), scale)
                if y is not None:
                    return y
            return _add_one(linear(x, weight), x, A, B, scale)
        except (RuntimeError, TypeError, ValueError):
            _check_linear(x, weight, A, B, bias)
            raise
    _check_linear(x, weight, A, B, bias)
    if _needs_grad(x, A, B, bias):
        return _LoRALinear.apply(x, weight, bias, scale, A, B)
    return _add_one(linear(x, weight, bias), x, A, B, scale)


def _add_one(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    _call(lora_add_, _check.add, y, (y, x, (A,), (B,), None, None, None, None, None, None, scale))
    return y


def _check_linear(x: Any, weight: Any, A: Any, B: Any, bias: Any) -> None:
    _check.floating("x", x)
    for name, value in (("weight", weight), ("A", A), ("B", B)):
        _check.tensor(name, value)
        _check.same_device(name, value, x)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        K = x.shape[-1] if x.dim() else "K"
        raise ValueError(f"weight must be [N, {K}] for x {_check.shape(x)}, got {_check.shape(weight)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} as x, got {weight.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires grad, but lora_linear takes it as frozen: weight.requires_grad_(False)")
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(f"A must be [R, K] and B [N, R], got {_check.shape(A)} and {_check.shape(B)}")
    if B.shape[0] != weight.shape[0]:
        raise ValueError(f"B must be [{weight.shape[0]}, {A.shape[0]}] for the weight, got {_check.shape(B)}")
    if bias is not None:
        _check.tensor("bias", bias)
        _check.same_device("bias", bias, x)
        if bias.dtype != x.dtype:
            raise TypeError(f"bias must be {x.dtype} as x, got {bias.dtype}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}], got {_check.shape(bias)}")


class _LoRALinear(torch.autograd.Function):
    """x Wᵀ + bias + s (x Aᵀ) Bᵀ with W frozen; keeps x itself and the small v = x Aᵀ."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, A, B):
        y = linear(x, weight, bias)
        _check.add(y, x, (A,), (B,), None, None, None, None, None, None, scale)
        v = lora_shrink(x, (A,), None, None, None, None, x.shape[:-1].numel())
        lora_expand_(y, v, (B,), None, None, None, None, None, None, scale)
        ctx.save_for_backward(x, weight, v, A, B)
        ctx.scale, ctx.backend = scale, None if is_compiling() else forced_backend()
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, v, A, B = ctx.saved_tensors
        need_x, _, need_bias, _, need_A, need_B = ctx.needs_input_grad
        need = need_x, False, [need_A], [need_B]
        with under(ctx.backend):
            dx, _, (dA,), (dB,) = lora_backward(dy, x, weight, [A], [B], v, *[None] * 4, ctx.scale, *need)
        return dx, None, dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None, None, dA, dB
