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
from ._transforms import haar as haar_op
from ._transforms import hadamard, trigonometric


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
    _check_row(x, norm)
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


def dct(x: Tensor, *, type: Literal[2, 3] = 2, norm: Literal["ortho"] | None = "ortho") -> Tensor:
    """y_k = 2 Σ_j x_j cos(π k (2j + 1) / 2N), the discrete cosine transform of each row, of any length N.

    Type 3 is y_j = x_0 + 2 Σ_{k>0} x_k cos(π k (2j + 1) / 2N). With "ortho" type 2 is divided by √(2N), and y_0 by √2
    besides, so that it is orthogonal, and type 3 is its transpose and inverse.

    Args:
        x: [..., N], fp32, bf16 or fp16, any strides.
        type: 2 or 3.
        norm: "ortho" or None.

    Returns:
        [..., N] in x's dtype, contiguous; differentiable any number of times.

    Raises:
        TypeError: x is no tensor or of another dtype.
        ValueError: x is a scalar or has rows of no numbers, or an unknown type or norm.

    Source: Ahmed, Natarajan and Rao 1974; scipy.fft.dct's conventions; Makhoul 1980 for the way to one FFT.
    """
    _check_row(x, norm)
    N = _length(x)
    if type == 2:
        first, rest = (2.0, 2.0) if norm is None else (N**-0.5, (2 / N) ** 0.5)
    elif type == 3:
        first, rest = (1.0, 2.0) if norm is None else (N**-0.5, (2 / N) ** 0.5)
    else:
        raise ValueError(f"type must be 2 or 3, got {type!r}")
    return _trigonometric(x, "cosine", first, rest, type == 3)


def idct(x: Tensor, *, type: Literal[2, 3] = 2, norm: Literal["ortho"] | None = "ortho") -> Tensor:
    """The inverse of :func:`dct` of the same type and norm: type 3 for 2 and 2 for 3, over 2N where norm is None.

    Args, returns, raises: as :func:`dct`.
    """
    _check_row(x, norm)
    N = _length(x)
    if type not in (2, 3):
        raise ValueError(f"type must be 2 or 3, got {type!r}")
    if norm == "ortho":
        first, rest = N**-0.5, (2 / N) ** 0.5
    else:
        first, rest = (0.5 / N, 1.0 / N) if type == 2 else (1.0 / N, 1.0 / N)
    return _trigonometric(x, "cosine", first, rest, type == 2)


def dht(x: Tensor, *, norm: Literal["ortho"] | None = "ortho") -> Tensor:
    """y_k = Σ_j x_j (cos(2π jk / N) + sin(2π jk / N)), the discrete Hartley transform of each row, of any length N.

    It is symmetric, and with "ortho", which divides by √N, its own inverse.

    Args, returns, raises: as :func:`dct`, without a type.

    Source: Bracewell 1983.
    """
    _check_row(x, norm)
    scale = _length(x) ** -0.5 if norm == "ortho" else 1.0
    return _trigonometric(x, "hartley", scale, scale, False)


def haar(x: Tensor, *, levels: int = 1) -> Tensor:
    """(L x, H x) for each row x, and so again for L x: the orthonormal Haar wavelet transform, of any length N.

    (L x)_j = (x_{2j} + x_{2j+1}) / √2 and (H x)_j = (x_{2j} - x_{2j+1}) / √2. Of an odd length L x has the greater
    half, and ends with the row's last number as it is. The levels' order is
    (L³ x, H L² x, H L x, H x) for three.

    Args:
        x: [..., N], fp32, bf16 or fp16, any strides.
        levels: how often, at least 1; a level of one number changes nothing.

    Returns:
        [..., N] in x's dtype, contiguous; differentiable any number of times.

    Raises:
        TypeError: x is no tensor or of another dtype.
        ValueError: x is a scalar or has rows of no numbers, or levels is no int of at least 1.

    Source: Haar 1910; the signs are pywt's.
    """
    return _haar(x, levels, False)


def ihaar(x: Tensor, *, levels: int = 1) -> Tensor:
    """The inverse of :func:`haar` with as many levels, which is its transpose.

    Args, returns, raises: as :func:`haar`.
    """
    return _haar(x, levels, True)


def _check_row(x: Tensor, norm: Any = None) -> None:
    _check.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., N], got a scalar")
    if norm not in ("ortho", None):
        raise ValueError(f"norm must be 'ortho' or None, got {norm!r}")


def _length(x: Tensor) -> int:
    if not x.shape[-1]:
        raise ValueError(f"x must have rows of at least one number, got {_check.shape(x)}")
    return int(x.shape[-1])


def _trigonometric(x: Tensor, form: str, first: float, rest: float, transpose: bool) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Trigonometric.apply(x, form, first, rest, transpose)
    return trigonometric(x, form, first, rest, transpose)


class _Trigonometric(torch.autograd.Function):
    """D T x; the gradient is (D T)ᵀ dy, by the same function."""

    @staticmethod
    def forward(ctx: Any, x, *rest):
        ctx.rest = rest
        note_backend(ctx)
        return trigonometric(x, *rest)

    @staticmethod
    def backward(ctx: Any, dy):
        *form, transpose = ctx.rest
        with under(ctx.backend):
            return _Trigonometric.apply(dy, *form, not transpose), None, None, None, None


def _haar(x: Tensor, levels: int, transpose: bool) -> Tensor:
    _check_row(x)
    if type(levels) is not int or levels < 1:
        raise ValueError(f"levels must be an int of at least 1, got {levels!r}")
    levels = min(levels, max((_length(x) - 1).bit_length(), 1))
    if torch.is_grad_enabled() and x.requires_grad:
        return _Haar.apply(x, levels, transpose)
    return haar_op(x, levels, transpose)


class _Haar(torch.autograd.Function):
    """The transform or its transpose; the gradient is the other one of dy, by the same function."""

    @staticmethod
    def forward(ctx: Any, x, levels, transpose):
        ctx.levels, ctx.transpose = levels, transpose
        note_backend(ctx)
        return haar_op(x, levels, transpose)

    @staticmethod
    def backward(ctx: Any, dy):
        with under(ctx.backend):
            return _Haar.apply(dy, ctx.levels, not ctx.transpose), None, None
