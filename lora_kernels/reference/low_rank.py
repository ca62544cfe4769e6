"""``low_rank`` in plain PyTorch: many LoRA adapters over the rows of one batch.

Every function takes any floating dtype on any device and accumulates in fp32 (fp64 for fp64).
Notation: M rows, K in, N out, R padded rank, L adapters, S slices, P = M * k pairs of a row and an adapter
(k = 1 unless a row mixes adapters).

Factors come in one of three forms:

* stacked: S tensors, A ``[L, R, K]`` and B ``[L, N_s, R]``;
* listed: L matrices of one slice, A ``[r_l, K]`` and B ``[N, r_l]``, each with a rank of its own;
* packed: S tensors B as stacked, and one A ``[L, S * R, K]`` whose slice s lies at rows s * r_l to (s + 1) * r_l of an
  adapter with live rank r_l.

Which adapter a row uses comes in one of four forms: ``ids [M]`` or ``[M, k]``; ``ids [n_seg]`` with ``indptr
[n_seg + 1]``; a ``plan`` table (below); or nothing, and every row uses adapter 0. An id of -1 is no adapter.

A plan table is int32 ``[2 + (L + 1) + capacity]``: P, L, the offsets of the L adapters' runs, and the pairs sorted by
adapter, those without an adapter left out. Its ids or segments may be of rows in an ``order`` other than x's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are held in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_slices(factors: Sequence[Tensor]) -> int:
    """S of factors in either form."""
    return len(factors) if factors[0].dim() == 3 else 1


def num_adapters(factors: Sequence[Tensor]) -> int:
    """L of factors in either form."""
    return factors[0].shape[0] if factors[0].dim() == 3 else len(factors)


def padded_rank(A: Sequence[Tensor]) -> int:
    """R of the A factors in either form."""
    return max(a.shape[-2] for a in A)


def is_packed(A: Sequence[Tensor], B: Sequence[Tensor]) -> bool:
    """Whether one A holds the slices of several B's."""
    return len(A) == 1 and len(B) > 1 and A[0].dim() == 3


def unpacked(A: Tensor, B: Sequence[Tensor], ranks: Tensor | None) -> list[Tensor]:
    """A stack for each slice of a packed A, by a differentiable copy; what is past a live rank means nothing."""
    S, L, R = len(B), A.shape[0], B[0].shape[-1]
    rank = torch.full((L,), R, device=A.device) if ranks is None else ranks.long().clamp(0, R)
    row = torch.arange(R, device=A.device)
    at = [(s * rank[:, None] + row).clamp(max=max(A.shape[1] - 1, 0)) for s in range(S)]
    return [A.gather(1, i[:, :, None].expand(L, R, A.shape[2])) for i in at]


def num_pairs(rows: int, ids: Tensor | None, indptr: Tensor | None) -> int:
    """P: a pair for each row, or k pairs a row where ``ids`` is ``[M, k]``."""
    return ids.numel() if ids is not None and indptr is None else rows


def lora_plan_(
    table: Tensor, ids: Tensor, indptr: Tensor | None, num_adapters: int, order: Tensor | None = None
) -> None:
    """Write the plan of ``ids`` (see the module) into ``table``; no synchronisation with the host.

    With ``order [P]`` the ids or segments are of the pairs order[0], order[1], ..., instead of 0, 1, ...
    """
    flat = ids.reshape(-1)
    if indptr is not None:
        capacity = table.numel() - num_adapters - 3 if order is None else order.numel()
        row = torch.arange(capacity, device=ids.device)
        segment = torch.searchsorted(indptr.long().contiguous(), row, right=True) - 1
        inside = (segment >= 0) & (segment < flat.numel())
        if flat.numel():
            flat = torch.where(inside, flat[segment.clamp(0, flat.numel() - 1)], -1)
        else:
            flat = torch.full_like(row, -1)
        pairs = indptr[-1] if indptr.numel() else torch.zeros((), dtype=torch.int32, device=ids.device)
    else:
        pairs = torch.full((), flat.numel(), dtype=torch.int32, device=ids.device)
    if order is not None:
        pairs = torch.full((), order.numel(), dtype=torch.int32, device=ids.device)
    none = (flat < 0) | (flat >= num_adapters)
    key, place = torch.sort(torch.where(none, num_adapters, flat).long(), stable=True)
    bounds = torch.searchsorted(key, torch.arange(num_adapters + 1, device=ids.device))
    table[0] = pairs
    table[1] = num_adapters
    table[2 : num_adapters + 3] = bounds
    table[num_adapters + 3 : num_adapters + 3 + place.numel()] = place if order is None else order.long()[place]


def pairs_by_adapter(
    rows: int, num_adapters: int, ids: Tensor | None, indptr: Tensor | None, plan: Tensor | None, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yield each adapter in use with its pairs, ``(l, [m_l])``, in ascending order of both."""
    if plan is None:
        if ids is None:
            if rows:
                yield 0, torch.arange(rows, device=device)
            return
        capacity = num_pairs(rows, ids, indptr)
        plan = torch.empty(num_adapters + 3 + capacity, dtype=torch.int32, device=device)
        lora_plan_(plan, ids, indptr, num_adapters)
    bounds = plan[2 : num_adapters + 3].tolist()
    order = plan[num_adapters + 3 :]
    for adapter, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop > start:
            yield adapter, order[start:stop].long()


def pairs_per_row(pairs: int, rows: int) -> int:
    """k: how many of the pairs each row has, 1 where there is no row."""
    return max(pairs // max(rows, 1), 1)


def live_rank(ranks: Tensor | None, slice_: int, adapter: int, width: int) -> int:
    """The rank to use of a factor ``width`` wide: all of it, or what ``ranks`` ([L] or [S, L]) says."""
    if ranks is None:
        return width
    return min(int(ranks[adapter] if ranks.dim() == 1 else ranks[slice_, adapter]), width)


def of_slice(values: Tensor | None, slice_: int) -> Tensor | None:
    """What [L] or [S, L] holds for one slice, as [L]."""
    return values if values is None or values.dim() == 1 else values[slice_]


def scale_of(scaling: Tensor | None, scale: float, slice_: int, adapter: int) -> float:
    """s of one slice of one adapter: ``scale`` times its entry of ``scaling`` ([L] or [S, L])."""
    if scaling is None:
        return scale
    return scale * float(scaling[adapter] if scaling.dim() == 1 else scaling[slice_, adapter])


def _factor(factors: Sequence[Tensor], slice_: int, adapter: int) -> Tensor:
    return factors[slice_][adapter] if factors[0].dim() == 3 else factors[adapter]


def rows_of(x: Tensor) -> Tensor:
    """x with all leading axes as one, [M, ...]; a view where the strides allow it."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def lora_shrink(
    x: Tensor,
    A: Sequence[Tensor],
    ids: Tensor | None,
    indptr: Tensor | None,
    plan: Tensor | None,
    ranks: Tensor | None,
    pairs: int,
) -> Tensor:
    """v = x Aᵀ, one row a pair: fp32 ``[S, P, R]``, zero past the live rank and where there is no adapter."""
    rows = rows_of(x)
    dtype = accumulate_dtype(x.dtype)
    v = torch.zeros(num_slices(A), pairs, padded_rank(A), dtype=dtype, device=x.device)
    k = pairs_per_row(pairs, rows.shape[0])
    for adapter, pair in pairs_by_adapter(rows.shape[0], num_adapters(A), ids, indptr, plan, x.device):
        block = rows[pair // k].to(dtype)
        for s in range(v.shape[0]):
            a = _factor(A, s, adapter)
            r = live_rank(ranks, s, adapter, a.shape[0])
            v[s, pair, :r] = block @ a[:r].to(dtype).T
    return v


def lora_expand_(
    y: Tensor,
    v: Tensor,
    B: Sequence[Tensor],
    ids: Tensor | None,
    indptr: Tensor | None,
    plan: Tensor | None,
    scaling: Tensor | None,
    ranks: Tensor | None,
    weights: Tensor | None,
    scale: float,
) -> None:
    """y += s · w · v Bᵀ, each slice into its own columns, the pairs of a row summed and rounded into y once."""
    out = rows_of(y).to(v.dtype, copy=True)
    k = pairs_per_row(v.shape[1], out.shape[0])
    for adapter, pair in pairs_by_adapter(out.shape[0], num_adapters(B), ids, indptr, plan, y.device):
        start = 0
        for s in range(v.shape[0]):
            b = _factor(B, s, adapter)
            r = live_rank(ranks, s, adapter, b.shape[1])
            block = v[s, pair, :r] * scale_of(scaling, scale, s, adapter)
            if weights is not None:
                block = block * weights.reshape(-1)[pair].to(v.dtype)[:, None]
            columns = slice(start, start + b.shape[0])
            out[:, columns].index_add_(0, pair // k, block @ b[:, :r].to(v.dtype).T)
            start += b.shape[0]
    y.copy_(out.reshape(y.shape))


def lora_add_(
    y: Tensor,
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    ids: Tensor | None,
    indptr: Tensor | None,
    plan: Tensor | None,
    scaling: Tensor | None,
    ranks: Tensor | None,
    weights: Tensor | None,
    scale: float,
) -> None:
    """y += s · w · (x Aᵀ) Bᵀ: the shrink and the expand in one call."""
    rows = x.shape[:-1].numel()
    pairs = weights.numel() if weights is not None else num_pairs(rows, ids, indptr)
    if is_packed(A, B):
        A = unpacked(A[0], B, ranks)
    v = lora_shrink(x, A, ids, indptr, plan, ranks, pairs)
    lora_expand_(y, v, B, ids, indptr, plan, scaling, ranks, weights, scale)


def lora_outer(
    u: Tensor,
    w: Tensor,
    num_adapters: int,
    ids: Tensor | None,
    indptr: Tensor | None,
    plan: Tensor | None,
    scaling: Tensor | None,
    weights: Tensor | None,
    scale: float,
    pairs: int,
) -> Tensor:
    """G_l = s_l Σ w_p u_pᵀ w_p over the pairs p of adapter l: fp32 ``[L, U, W]``, zero for an unused adapter.

    ``u [P or M, U]`` and ``w [P or M, W]``; a tensor with M rows is read at a pair's row. ``scaling`` is ``[L]``.
    """
    left, right = rows_of(u), rows_of(w)
    dtype = accumulate_dtype(torch.promote_types(u.dtype, w.dtype))
    out = torch.zeros(num_adapters, left.shape[1], right.shape[1], dtype=dtype, device=u.device)
    rows = min(left.shape[0], right.shape[0])
    for adapter, pair in pairs_by_adapter(rows, num_adapters, ids, indptr, plan, u.device):
        a = left[pair // pairs_per_row(pairs, left.shape[0])].to(dtype)
        b = right[pair // pairs_per_row(pairs, right.shape[0])].to(dtype)
        if weights is not None:
            a = a * weights.reshape(-1)[pair].to(dtype)[:, None]
        out[adapter] = (a.T @ b) * scale_of(scaling, scale, 0, adapter)
    return out
