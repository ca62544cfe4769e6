"""``structured``: adapters that multiply a frozen weight by an orthogonal matrix, W' = W P, without forming P or W'.

A product of reflections is the identity and a matrix of low rank, so W' is W with a LoRA adapter; a block-diagonal
rotation is a sparse matrix on the rows of x. x is fp32, bf16 or fp16; sums are held in fp32 and results rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..spectral_plan import SpectralPlan
from . import _check
from ._autograd import note_backend, once_differentiable
from ._lora_linear import lora_down
from ._low_rank import lora_outer
from .lora_linear import lora
from .spectral import spectral_linear


def householder_linear(x: Tensor, weight: Tensor, U: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """y = x (W P)ᵀ + bias with P = (I - 2 û_0 û_0ᵀ) (I - 2 û_1 û_1ᵀ) ..., û_i the i-th column of U over its length.

    P = I - Û T Ûᵀ with T⁻¹ = ½ I + striu(Ûᵀ Û), the compact WY form, so that the adapter is LoRA's op with A = Ûᵀ and
    B = -W Û T, whatever the number of rows of x.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: W [N, K], frozen, in x's dtype.
        U: [K, r], in x's dtype or float32; a column of zeros makes y NaN.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype; differentiable in x, U and bias.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: one of the wrong shape or on another device.

    Source: Yuan et al., HRA (arXiv 2405.17484); Schreiber and Van Loan 1989 for the compact form.
    """
    _check.floating("x", x)
    _check.floating("weight", weight)
    _check.floating("U", U)
    for name, t in (("weight", weight), ("U", U)) + ((("bias", bias),) if bias is not None else ()):
        _check.same_device(name, t, x)
    if weight.dtype != x.dtype or U.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight and U must be {x.dtype}, U float32 at most, got {weight.dtype} and {U.dtype}")
    if weight.dim() != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [N, K] for x [..., K], got {_check.shape(weight)} and {_check.shape(x)}")
    if U.dim() != 2 or U.shape[0] != weight.shape[1] or not 1 <= U.shape[1] <= _check.MAX_RANK:
        raise ValueError(f"U must be [{weight.shape[1]}, r] with r from 1 to {_check.MAX_RANK}, got {_check.shape(U)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {_check.shape(bias)}")
    A, B = householder_factors(weight, U)
    return lora(x, weight, None if bias is None else bias.to(x.dtype), None, 1.0, A, B)


def householder_factors(weight: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) in fp32 with W P = W + B A, see :func:`householder_linear`; differentiable in U."""
    U = U.to(torch.promote_types(U.dtype, torch.float32))
    A = (U / U.norm(dim=0)).T.contiguous()
    eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    T = torch.linalg.solve_triangular(torch.triu(A @ A.T, 1) + eye / 2, eye, upper=True)
    return A, -(_WeightTimes.apply(weight.detach(), A) @ T)


class _WeightTimes(torch.autograd.Function):
    """W Aᵀ in fp32 for a frozen W in any dtype, which is read as it is."""

    @staticmethod
    def forward(ctx: Any, weight, A):
        ctx.save_for_backward(weight)
        note_backend(ctx)
        return lora_down(weight, A, None, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dv):
        (weight,) = ctx.saved_tensors
        return None, lora_outer(dv.contiguous(), weight, 1, None, None, None, None, None, 1.0, weight.shape[0])[0]


def block_rotate(x: Tensor, R: Tensor) -> Tensor:
    """y_d = x_d R_d for each block x_d of b numbers of a row: x times the block-diagonal matrix of R.

    Args:
        x: [..., D b], fp32, bf16 or fp16.
        R: [D, b, b] in x's dtype or float32: rotations, or any matrices; or [1, b, b], the same for every block.

    Returns:
        x's shape and dtype; differentiable in x and R.

    Raises:
        TypeError: x or R is no tensor or of another dtype.
        ValueError: R does not fit x, or is on another device.

    Source: Qiu et al., OFT (arXiv 2306.07280); Liu et al., BOFT (arXiv 2311.06243).
    """
    _check.floating("x", x)
    _check.floating("R", R)
    _check.same_device("R", R, x)
    if R.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"R must be {x.dtype} or float32, got {R.dtype}")
    b = R.shape[-1] if R.dim() == 3 and R.shape[1] == R.shape[2] else 0
    if not b or x.dim() == 0 or x.shape[-1] % b or R.shape[0] not in (1, x.shape[-1] // b):
        raise ValueError(f"R must be [D, b, b] for x [..., D b], got {_check.shape(R)} and {_check.shape(x)}")
    D = x.shape[-1] // b
    return spectral_linear(x, R.expand(D, b, b).reshape(-1), _blocks(D, b, x.device), kind="identity")


@functools.cache
def _blocks(D: int, b: int, device: torch.device) -> SpectralPlan:
    """Where R's entries stand in the transpose of its block-diagonal matrix."""
    with _disable_current_modes(), torch.inference_mode(False):
        d, i, j = (t.reshape(-1) for t in torch.meshgrid(*(torch.arange(n) for n in (D, b, b)), indexing="ij"))
        return SpectralPlan((d * b + j).to(device), (d * b + i).to(device), shape=(D * b, D * b))


def cayley(S: Tensor) -> Tensor:
    """(I - S) (I + S)⁻¹ of each skew-symmetric matrix: an orthogonal one.

    Args:
        S: [..., b, b] in float32 or float64, skew-symmetric.

    Returns:
        [..., b, b]; differentiable.
    """
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    return torch.linalg.solve(eye + S, eye - S, left=False)
