"""``transforms`` in plain PyTorch: orthogonal transforms along the last axis, exact for the length it has.

Every function takes any floating dtype on any device and accumulates in fp32 (fp64 for fp64). N is the length of a row.
"""

from __future__ import annotations

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
