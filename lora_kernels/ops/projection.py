"""``projection``: gradients projected onto rows of a fixed orthogonal matrix, for optimizers with low-rank states."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _check
from .transforms import dct, idct

Side = Literal["right", "left"]
PANEL = 1024  # rows that are transformed at a time


def dct_topk_project(
    G: Tensor, rank: int, *, side: Side | Literal["auto"] = "auto", ell: Literal[1, 2] = 2
) -> tuple[Tensor, Tensor]:
    """(g, indices): the ``rank`` cosine coefficients of G's rows (right) or columns (left) that hold most of it.

    With C the orthonormal DCT-II, S = G Cᵀ (right) or C G (left), indices are those of its columns or rows with the
    largest ℓ1 or ℓ2 norms, and g is these. For a fixed C and ℓ2 nothing of that rank comes closer to G; no singular
    vectors are computed, and a state needs ``rank`` integers in place of a matrix.

    Args:
        G: [R, C], fp32, bf16 or fp16, any strides.
        rank: from 1 to the length that is transformed.
        side: "auto": right where R ≥ C, else left.
        ell: which norm.

    Returns:
        g [R, rank] or [rank, C] in G's dtype, and int64 [rank], ascending; not differentiable.

    Raises:
        TypeError: G is no tensor or of another dtype.
        ValueError: it is no matrix, or an unknown side or norm, or a rank out of range.

    Source: Modoranu et al. 2025, SVD-free low-rank adaptive gradient optimization.
    """
    _check.floating("G", G)
    if G.dim() != 2 or not G.numel():
        raise ValueError(f"G must be [R, C], not empty, got {_check.shape(G)}")
    if side not in ("right", "left", "auto"):
        raise ValueError(f"side must be 'right', 'left' or 'auto', got {side!r}")
    if ell not in (1, 2):
        raise ValueError(f"ell must be 1 or 2, got {ell!r}")
    right = side == "right" or (side == "auto" and G.shape[0] >= G.shape[1])
    rows = G.detach() if right else G.detach().mT
    _rank(rank, rows.shape[1])
    sums = G.new_zeros(rows.shape[1], dtype=torch.promote_types(G.dtype, torch.float32))
    for panel in rows.split(PANEL):
        S = dct(panel).to(sums.dtype)
        sums += S.abs().sum(0) if ell == 1 else S.square().sum(0)
    indices = sums.topk(rank).indices.sort().values
    g = torch.cat([dct(panel)[:, indices] for panel in rows.split(PANEL)])
    return g if right else g.mT.contiguous(), indices


def dct_backproject(g: Tensor, indices: Tensor, length: int, *, side: Side) -> Tensor:
    """G's part that :func:`dct_topk_project` kept: g C[indices] (right) or C[indices]ᵀ g (left).

    Args:
        g: [R, rank] or [rank, C].
        indices: int64 [rank].
        length: C or R, the length that was transformed.
        side: "right" or "left".

    Returns:
        [R, length] or [length, C] in g's dtype; not differentiable.

    Raises:
        TypeError: g or indices is no tensor or of another dtype.
        ValueError: they do not fit each other, or an unknown side, or a length below the rank.
        IndexError: an index out of range, on the CPU.
    """
    _check.floating("g", g)
    _check.tensor("indices", indices)
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    _check.same_device("indices", indices, g)
    if g.dim() != 2 or indices.shape != (g.shape[1 if side == "right" else 0],):
        raise ValueError(f"g and indices do not fit: {_check.shape(g)} and {_check.shape(indices)}, side {side!r}")
    _rank(indices.shape[0], length)
    if _check.readable(indices) and bool(((indices < 0) | (indices >= length)).any()):
        raise IndexError(f"indices must lie in 0..{length - 1}")
    rows = g.detach() if side == "right" else g.detach().mT
    parts = []
    for panel in rows.split(PANEL):
        S = panel.new_zeros(panel.shape[0], length)
        parts.append(idct(S.index_copy_(1, indices, panel)))
    G = torch.cat(parts)
    return G if side == "right" else G.mT.contiguous()


def _rank(rank: Any, length: Any) -> None:
    if type(length) is not int or type(rank) is not int or not 1 <= rank <= length:
        raise ValueError(f"rank must be an int from 1 to the transformed length {length!r}, got {rank!r}")
