"""A linear layer with one LoRA adapter in training, in plain PyTorch: the oracle, the fallback and the baseline.

Around the base layer's products, which are torch's, stand three ops. With v = x̃ Aᵀ, x̃ = mask∘x and s the scale, which
holds what dropout scales by:

    forward            y ← c∘y + e∘z + s v Bᵀ + b
    from dy            dv = dy B,  dB = s dyᵀ v,  dz = c∘dy,  t = Σ_m dy∘(y - b)
    into dx            dx ← dx + s mask∘(dv A),  dA = s dvᵀ x̃

and one over the weights alone, for DoRA: the norm of each row of W + s B A.

The mask is that of ``reference.dropout``; without a seed there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import dropout_mask
from .low_rank import accumulate_dtype, rows_of

#: Below this share of ‖W‖² too few digits of the sum are left.
CANCELLED = 0.1


def lora_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x̃ = mask∘x, not scaled, in x's shape and dtype; contiguous."""
    rows = rows_of(x)
    mask = dropout_mask(seed.to(x.device), rows.shape[0], rows.shape[1], p)
    return torch.where(mask, rows, 0).to(x.dtype).reshape(x.shape)


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    return x if seed is None else lora_dropout(x, seed, p)


def lora_down(x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """v = x̃ Aᵀ, fp32 ``[M, R]``."""
    dtype = accumulate_dtype(x.dtype)
    return rows_of(_dropped(x, seed, p)).to(dtype) @ A.to(dtype).T


def lora_forward_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    column_scale: Tensor | None,
    other: Tensor | None,
    other_scale: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> Tensor:
    """y ← c∘y + e∘other + s v Bᵀ + b, rounded once; returns v = x̃ Aᵀ, fp32 ``[M, R]``.

    ``column_scale`` c, ``other_scale`` e and ``bias`` are ``[N]``: fp32, the bias also in y's dtype. ``other`` has y's
    shape and dtype.
    """
    dtype = accumulate_dtype(x.dtype)
    v = lora_down(x, A, seed, p)
    out = y.to(dtype) if column_scale is None else y.to(dtype) * column_scale.to(dtype)
    if other is not None:
        out = out + other.to(dtype) * (1 if other_scale is None else other_scale.to(dtype))
    out = out + scale * (v @ B.to(dtype).T).view(y.shape)
    y.copy_(out if bias is None else out + bias.to(dtype))
    return v


def lora_out_grads(
    dy: Tensor,
    v: Tensor,
    B: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor | None,
    scale: float,
    need_v: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dv, dB, dz, t) in one pass over dy: dv = dy B, dB = s dyᵀ v, dz = c∘dy, t = Σ_m dy∘(y - b).

    Returns:
        dv fp32 ``[M, R]``, dB fp32 ``[N, R]``, dz as dy and t fp32 ``[N]``; empty: dv and dB where not needed, dz
        without ``column_scale``, t without ``y``.
    """
    dtype = accumulate_dtype(dy.dtype)
    rows = rows_of(dy).to(dtype)
    none = v.new_empty(0)
    dz, t = dy.new_empty(0), none
    if column_scale is not None:
        dz = (rows * column_scale.to(dtype)).to(dy.dtype).view(dy.shape)
    if y is not None:
        output = rows_of(y).to(dtype)
        t = (rows * (output if bias is None else output - bias.to(dtype))).sum(0)
    return rows @ B.to(dtype) if need_v else none, scale * rows.T @ v if need_B else none.clone(), dz, t


def lora_in_grads_(
    dx: Tensor,
    dv: Tensor,
    x: Tensor | None,
    A: Tensor,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> Tensor:
    """dx ← dx + s mask∘(dv A), rounded once; returns dA = s dvᵀ x̃, fp32 ``[R, K]``, empty without x.

    A ``dx`` without elements is not needed.
    """
    if dx.numel():
        step = scale * dv @ A.to(dv.dtype)
        if seed is not None:
            step = torch.where(dropout_mask(seed.to(dx.device), step.shape[0], step.shape[1], p), step, 0)
        dx.copy_(dx.to(dv.dtype) + step.view(dx.shape))
    if x is None:
        return dv.new_empty(0)
    return scale * dv.T @ rows_of(_dropped(x, seed, p)).to(dv.dtype)


def lora_weight_norm(weight: Tensor, A: Tensor, B: Tensor, weight_norm_sq: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row, fp32 ``[N]``, given ‖W‖² of each, without the product B A.

    Its square is ‖W‖² + 2 s · rowsum(B∘(W Aᵀ)) + s² · rowsum((B A Aᵀ)∘B), row by row. On the CPU rows that nearly
    cancel are computed as they stand.
    """
    dtype = accumulate_dtype(weight.dtype)
    return norm_of_products(weight.to(dtype) @ A.to(dtype).T, weight, A, B, weight_norm_sq, scale)


def norm_of_products(
    products: Tensor, weight: Tensor, A: Tensor, B: Tensor, weight_norm_sq: Tensor, scale: float
) -> Tensor:
    """The same, given W Aᵀ."""
    wide, tall = A.to(products.dtype), B.to(products.dtype)
    of_rows = torch.addmm(products, tall, wide @ wide.T, beta=2 * scale, alpha=scale**2)
    square = weight_norm_sq + (tall * of_rows).sum(1)
    if square.is_cpu:
        cancelled = square < CANCELLED * weight_norm_sq
        rows = weight[cancelled].to(tall.dtype).addmm(tall[cancelled], wide, alpha=scale)
        square[cancelled] = rows.square().sum(1)
    return square.clamp_min_(0).sqrt_()
