"""``transforms`` in plain PyTorch: orthogonal transforms along the last axis, exact for the length it has.

Every function takes any floating dtype on any device and accumulates in fp32 (fp64 for fp64). N is the length of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .hadamard import unpacked
from .low_rank import accumulate_dtype


def hadamard(x: Tensor, signs: Tensor | None, orders: Sequence[int], scale: float, transpose: bool) -> Tensor:
    """y = scale · H x for each row x, or scale · Hᵀ x, with H = H₁ ⊗ H₂ ⊗ ... ⊗ H_{2^m}.

    Args:
        x: [..., N].
        signs: the bases' signs, see :func:`~lora_kernels.reference.hadamard.signs_of`; None where there is no base.
        orders: those of H₁, H₂, ...; N over their product is 2^m. A base is the package's matrix of its order
            (:func:`~lora_kernels.reference.hadamard.base`), so a kernel may know it without reading the signs.
        scale: what every entry of H is multiplied by.
        transpose: Hᵀ in place of H.

    Returns:
        x's shape and dtype, contiguous; rounded once.
    """
    dtype = accumulate_dtype(x.dtype)
    y = x.to(dtype)
    lead, N, inner = x.shape[:-1], x.shape[-1], x.shape[-1]
    for negative in unpacked(signs, tuple(orders), transpose) if signs is not None else ():
        K = negative.shape[0]
        H = 1 - 2 * negative.to(dtype)
        inner //= K
        y = H @ y.reshape(*lead, N // (K * inner), K, inner)
    while inner > 1:
        inner //= 2
        a, b = y.reshape(*lead, N // (2 * inner), 2, inner).unbind(-2)
        y = torch.stack((a + b, a - b), -2)
    return (y.reshape(x.shape) * scale).to(x.dtype).contiguous()


def trigonometric(x: Tensor, form: str, first: float, rest: float, transpose: bool) -> Tensor:
    """y = D T x for each row x, or (D T)ᵀ x, with D = diag(first, rest, rest, ...) and T's row k over j = 0 .. N - 1

    * ``cosine``: cos(π k (2j + 1) / 2N), the DCT-II's;
    * ``hartley``: cos(2π jk / N) + sin(2π jk / N), which is symmetric;
    * ``fourier``: cos(2π jk / N) for k ≤ N / 2 and sin(2π j (N - k) / N) past it: a real row's discrete Fourier
      transform in its N numbers.

    Args:
        x: [..., N].
        form: T.
        first, rest: D.
        transpose: (D T)ᵀ in place of D T.

    Returns:
        x's shape and dtype, contiguous; rounded once.
    """
    y, N = x.to(accumulate_dtype(x.dtype)), x.shape[-1]
    if not y.numel():
        return x.clone(memory_format=torch.contiguous_format)
    order = _evens_then_odds(N, x.device) if form == "cosine" else None
    if transpose:
        y = _unfourier(_turned(_scaled(y, first, rest), form, True))
        y = y if order is None else y[..., order.argsort()]
    else:
        y = _fourier(y if order is None else y[..., order])
        y = _scaled(_turned(y, form, False), first, rest)
    return y.to(x.dtype).contiguous()


def _scaled(y: Tensor, first: float, rest: float) -> Tensor:
    return torch.cat((y[..., :1] * first, y[..., 1:] * rest), -1)


def _evens_then_odds(N: int, device: torch.device) -> Tensor:
    """0, 2, 4, ..., 5, 3, 1: the order in which a row's Fourier transform gives its cosine transform (Makhoul 1980)."""
    j = torch.arange(N, device=device)
    return torch.cat((j[0::2], j[1::2].flip(0)))


def _fourier(y: Tensor) -> Tensor:
    V = torch.fft.rfft(y)
    return torch.cat((V.real, -V.imag[..., 1 : (y.shape[-1] + 1) // 2].flip(-1)), -1)


def _unfourier(y: Tensor) -> Tensor:
    """The transpose of :func:`_fourier`."""
    N = y.shape[-1]
    real = y[..., : N // 2 + 1] * (N / 2)
    imag = torch.zeros_like(real)
    imag[..., 1 : (N + 1) // 2] = y[..., N // 2 + 1 :].flip(-1) * (-N / 2)
    real[..., 0] *= 2
    if N % 2 == 0:
        real[..., -1] *= 2
    return torch.fft.irfft(torch.complex(real, imag), n=N)


def _turned(y: Tensor, form: str, transpose: bool) -> Tensor:
    """Another form's row of a row's cosines and sines, or the transpose: each pair (k, N - k) is turned."""
    if form == "fourier":
        return y
    N, half = y.shape[-1], (y.shape[-1] + 1) // 2
    C, middle, S = y[..., 1:half], y[..., half : N // 2 + 1], y[..., N // 2 + 1 :].flip(-1)
    if form == "hartley":
        C, S = C + S, C - S
    else:
        angle = torch.arange(1, half, device=y.device).double() * (math.pi / (2 * N))
        cos, sin = angle.cos().to(y.dtype), angle.sin().to(y.dtype)
        sin = -sin if transpose else sin
        C, S = cos * C - sin * S, sin * C + cos * S
        middle = middle * math.sqrt(0.5)
    return torch.cat((y[..., :1], C, middle, S.flip(-1)), -1)


def haar(x: Tensor, levels: int, transpose: bool) -> Tensor:
    """y = (L x, H x) for each row x, and L x so again ``levels`` - 1 times; or the transpose, which is the inverse.

    (L x)_j = (x_{2j} + x_{2j+1}) / √2 and (H x)_j = (x_{2j} - x_{2j+1}) / √2; the last number of an odd length goes to
    the end of L x as it is.

    Args:
        x: [..., N].
        levels: how often, at least 1.
        transpose: the transpose.

    Returns:
        x's shape and dtype, contiguous; rounded once.
    """
    y = x.to(accumulate_dtype(x.dtype))
    lengths = [x.shape[-1]]
    while len(lengths) < levels:
        lengths.append((lengths[-1] + 1) // 2)
    for N in reversed(lengths) if transpose else lengths:
        y = torch.cat((_haar_level(y[..., :N], transpose), y[..., N:]), -1)
    return y.to(x.dtype).contiguous()


def _haar_level(y: Tensor, transpose: bool) -> Tensor:
    N, half = y.shape[-1], y.shape[-1] // 2
    a, b = (y[..., :half], y[..., N - half :]) if transpose else (y[..., 0 : N - 1 : 2], y[..., 1:N:2])
    a, b = (a + b) * math.sqrt(0.5), (a - b) * math.sqrt(0.5)
    if transpose:
        return torch.cat((torch.stack((a, b), -1).flatten(-2), y[..., half : N - half]), -1)
    return torch.cat((a, y[..., 2 * half :], b), -1)
