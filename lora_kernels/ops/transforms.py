"""``transforms``: orthogonal transforms along the last axis, exact for the length it has, forward and backward.

x is fp32, bf16 or fp16 with any leading axes and any strides; sums are held in fp32 and the result is rounded once.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference.hadamard import orders_of, signs_of
from . import _check
from ._autograd import note_backend
from ._dispatch import under
from ._transforms import hadamard


def wht(
    x: Tensor,
    *,
    norm: Literal["ortho"] | None = "ortho",
    transpose: bool = False,
    layout: Literal["auto", "quarot"] = "auto",
) -> Tensor:
    """y = H x for each row x: the Walsh-Hadamard transform, X Hᵀ of a matrix of rows.

    H = H₁ ⊗ H₂ ⊗ ... ⊗ H_{2^m} with entries ±1 and H Hᵀ = N I, exact for every length N that such a matrix can be
    constructed for: those of Llama's, Qwen's, Mistral's, Gemma's and GLM's layers are among them.

    Args:
        x: [..., N], fp32, bf16 or fp16, any strides.
        norm: "ortho" divides by √N, so that Hᵀ is H's inverse; None leaves the entries ±1.
        transpose: Hᵀ x. H is not symmetric for every N: gradients use the true transpose.
        layout: "quarot", the matrix of QuaRot, SpinQuant and QWHA, bit for bit; "auto", the same where they have one,
            else the Kronecker product with the fewest operations.

    Returns:
        [..., N] in x's dtype, contiguous; differentiable any number of times.

    Raises:
        TypeError: x is no tensor or of another dtype.
        ValueError: x is a scalar, no Hadamard matrix of order N is constructed here, or an unknown norm or layout.

    A row with an infinite number may come out NaN. A length's first call on a device copies its signs there: make it
    before a CUDA graph is captured.

    Source: Paley 1933 and Williamson 1944 for the bases, see ``lora_kernels.reference.hadamard``; Ashkboos et al.,
    QuaRot (arXiv 2404.00456) for its layout.
    """
    _check.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., N], got a scalar")
    if norm not in ("ortho", None):
        raise ValueError(f"norm must be 'ortho' or None, got {norm!r}")
    if layout not in ("auto", "quarot"):
        raise ValueError(f"layout must be 'auto' or 'quarot', got {layout!r}")
    N = int(x.shape[-1])
    orders = _orders(N, layout)
    signs = _signs(orders, x.device) if orders else None
    scale = 1.0 if norm is None else 1.0 / math.sqrt(N)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Hadamard.apply(x, signs, orders, scale, bool(transpose))
    return hadamard(x, signs, orders, scale, bool(transpose))


#: A compiler takes the results as constants, for both depend on nothing but the length and the device.
_orders = torch.compiler.assume_constant_result(lambda length, layout: orders_of(length, layout))
_signs = torch.compiler.assume_constant_result(lambda orders, device: signs_of(orders, device))


class _Hadamard(torch.autograd.Function):
    """scale · H x; the gradient is scale · Hᵀ dy, by the same function."""

    @staticmethod
    def forward(ctx: Any, x, signs, orders, scale, transpose):
        ctx.save_for_backward(signs)
        ctx.orders, ctx.scale, ctx.transpose = orders, scale, transpose
        note_backend(ctx)
        return hadamard(x, signs, orders, scale, transpose)

    @staticmethod
    def backward(ctx: Any, dy):
        (signs,) = ctx.saved_tensors
        with under(ctx.backend):
            return _Hadamard.apply(dy, signs, ctx.orders, ctx.scale, not ctx.transpose), None, None, None, None
