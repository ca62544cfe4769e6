"""``low_rank`` in Triton: the ops of ``lora_kernels.ops.low_rank`` with the same arguments, for GPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton
from lora_kernels.reference import low_rank as reference
from lora_kernels.select import expand_grad_tiles, expand_tiles, makes_v_again, outer_tiles, shrink_tiles

from . import _device
from ._repeat import launch, repeatable
from .grouped import block_l, or_else, planned, sum_into, tiles, write_plan
from .low_rank_kernels import add_kernel, expand_grad_kernel, expand_kernel, gather_kernel, outer_kernel, shrink_kernel

LISTED_MOST = 64  # matrices of a list that a kernel takes as they are; more are stacked by a copy


@repeatable
def lora_plan_(
    table: Tensor, ids: Tensor, indptr: Tensor | None, num_adapters: int, order: Tensor | None = None
) -> None:
    """Write the plan of ``ids`` into ``table`` in one kernel."""
    write_plan(table, ids, indptr, order, num_adapters)


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
    a = _factors(A, -2)
    with _device.on(x):
        plan = planned(pairs, a.adapters, ids, indptr, plan, x)
        return _whole(_shrink(x, a, plan, ranks, pairs, whole=True))


@repeatable
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
    b = _factors(B, -1)
    with _device.on(y):
        plan = planned(v.shape[1], b.adapters, ids, indptr, plan, y)
        _expand_(y, v.contiguous()[None], b, plan, scaling, ranks, weights, scale)


@repeatable
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
    """y += s · w · (x Aᵀ) Bᵀ in two kernels, three with the plan's."""
    a, b = _factors(A, -2), _factors(B, -1)
    packed = len(B) if reference.is_packed(A, B) else 1
    rows = x.shape[:-1].numel()
    pairs = weights.numel() if weights is not None else reference.num_pairs(rows, ids, indptr)
    with _device.on(x):
        plan = planned(pairs, a.adapters, ids, indptr, plan, x)
        if pairs == rows and makes_v_again(
            pairs, a.adapters, x.shape[-1], b.rank, x.dtype, a.dtype, _device.gpu(x.device)
        ):
            return _add_(y, x, a, b, plan, scaling, ranks, scale, packed > 1)
        parts = _shrink(x, a, plan, ranks, pairs, whole=False, packed=packed)
        _expand_(y, parts, b, plan, scaling, ranks, weights, scale, packed=packed > 1, overlap=True)


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
    """G_l = s_l Σ w_p u_pᵀ w_p over the pairs p of adapter l: fp32 ``[L, U, W]``, zero for an unused adapter."""
    with _device.on(u):
        plan = planned(pairs, num_adapters, ids, indptr, plan, u)
        rows = reference.rows_of(u)[None]
        return _outer(rows, w, num_adapters, plan, scaling, weights, scale, pairs, torch.float32)[0]


def lora_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    v: Tensor,
    plan: Tensor | None,
    scaling: Tensor | None,
    ranks: Tensor | None,
    weights: Tensor | None,
    scale: float,
    need_x: bool,
    need_v: bool,
    need_A: bool,
    need_B: bool,
) -> list[Tensor]:
    """The gradients of y += x Wᵀ + s · w · (x Aᵀ) Bᵀ: dy is read once for dv and dB, x once for dA."""
    listed = A[0].dim() == 2
    pairs, L, R = v.shape[1], reference.num_adapters(A), v.shape[2]
    dtype = A[0].dtype
    dB: list[Tensor] = []
    with _device.on(dy):
        need_dv = need_x or need_v or need_A
        dv, column = torch.empty_like(v), 0
        for s, b in enumerate([B] if listed else [[b] for b in B]):
            width = b[0].shape[-2]
            g = dy[..., column : column + width]
            column += width
            scaled, live = reference.of_slice(scaling, s), reference.of_slice(ranks, s)
            if need_dv and need_B and expand_grad_tiles(R, g.dtype, b[0].dtype, _device.gpu(g.device)).fused:
                grad = _expand_grad(dv[s], g, v[s], _factors(b, -1), plan, scaled, live, weights, scale, dtype, need_v)
                dB.append(grad)
                continue
            if need_dv:
                dv[s] = _whole(_shrink(g, _factors([t.mT for t in b], -2), plan, live, pairs, whole=need_v))[0]
            if need_B:
                g = reference.rows_of(g)[None]
                dB.append(_outer(g, v[s], L, plan, scaled, weights, scale, pairs, dtype)[0])
        dx = x.new_empty(0)
        if need_x:
            dx = x.new_zeros(x.shape) if weight is None else torch.matmul(dy, weight)
            _expand_(dx, dv[None], _factors([t.mT for t in A], -1), plan, scaling, ranks, weights, scale, summed=True)
        dA = _outer(dv, x, L, plan, scaling, weights, scale, pairs, dtype) if need_A else []
    if listed:
        dA = [dA[0][l, : a.shape[0]].clone() for l, a in enumerate(A)] if need_A else []
        narrow = [dB[0][l, :, : b.shape[1]] for l, b in enumerate(B)] if need_B else []
        dB = [t.clone(memory_format=torch.contiguous_format) for t in narrow]
    return [dx, dv if need_v else v.new_empty(0), *dA, *dB]


class _Factors(NamedTuple):
    """Factors as kernels take them: pointers, and strides in tuples of one entry where all are alike."""

    tensors: tuple[Tensor, ...]
    adapters: int
    rank: int  # padded
    widths: tuple[int, ...]  # of each slice, in K or N
    by_adapter: tuple[int, ...]
    by_rank: tuple[int, ...]
    by_column: tuple[int, ...]
    ranks: tuple[int, ...]  # of each matrix of a list
    listed: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def grain(self) -> int:
        """How many ranks of a column, which lie side by side, may be read at once: 8, or 1 where they may not."""
        sizes = (*self.by_column, self.rank, *(self.ranks if self.listed else ()))
        return 8 if self.by_rank == (1,) and not any(n % 8 for n in sizes) else 1

    @property
    def grains(self) -> tuple[int, ...]:
        """The strides from column to column, in grains."""
        return tuple(n // self.grain for n in self.by_column)


def _factors(factors: Sequence[Tensor], rank_axis: int) -> _Factors:
    column_axis = -3 - rank_axis
    listed = factors[0].dim() == 2
    if listed and len(factors) > LISTED_MOST:
        factors, listed = [_stacked(factors, rank_axis)], False
    ranks = tuple(f.shape[rank_axis] for f in factors)
    return _Factors(
        tuple(factors),
        len(factors) if listed else factors[0].shape[0],
        max(ranks),
        tuple(f.shape[column_axis] for f in factors[: 1 if listed else None]),
        (0,) if listed else tuple(f.stride(0) for f in factors),
        _alike([f.stride(rank_axis) for f in factors]),
        _alike([f.stride(column_axis) for f in factors]),
        ranks if listed else (0,),
        listed,
    )


def _alike(strides: list[int]) -> tuple[int, ...]:
    return (strides[0],) if strides.count(strides[0]) == len(strides) else tuple(strides)


def _stacked(factors: Sequence[Tensor], rank_axis: int) -> Tensor:
    """A list as one stack, padded with zeros."""
    size = [len(factors), *factors[0].shape]
    size[rank_axis] = max(f.shape[rank_axis] for f in factors)
    stack = factors[0].new_zeros(size)
    for l, f in enumerate(factors):
        stack[l].narrow(rank_axis, 0, f.shape[rank_axis]).copy_(f)
    return stack


def _shrink(
    x: Tensor,
    A: _Factors,
    plan,
    ranks,
    pairs: int,
    whole: bool,
    packed: int = 1,
    seed: Tensor | None = None,
    threshold: int = 0,
) -> Tensor:
    """The parts of v, ``[C, S, P, R]``, to be added in order.

    Args:
        whole: also zero for pairs without an adapter.
        packed: how many slices a stack holds.
        seed, threshold: of x's dropout.
    """
    rows = reference.rows_of(x)
    L, R, K, S = A.adapters, A.rank, rows.shape[1], len(A.widths)
    tile = shrink_tiles(pairs, L, K, R, S, x.dtype, A.dtype, _device.gpu(x.device), seed is not None)
    make = torch.zeros if not L or (whole and plan is not None) else torch.empty
    parts = make(tile.split, S, pairs, R, dtype=torch.float32, device=x.device)
    if not parts.numel() or not L:
        return parts
    blocks = 1 if tile.slices > 1 else S * triton.cdiv(R, tile.block_r)
    grid = (tiles(pairs, L, tile.block_m, plan), tile.split, blocks)
    launch(
        shrink_kernel, grid,
        parts, rows, A.tensors, or_else(plan, parts), or_else(ranks, parts), A.ranks,
        pairs, reference.pairs_per_row(pairs, rows.shape[0]), L, K, R,
        *rows.stride(), A.by_adapter, A.by_rank, A.by_column, *_strides(ranks),
        S=S, SLICES=tile.slices, PACKED=packed, CHUNK=tile.chunk, CHUNKS=tile.chunks // tile.split,
        EVEN_K=K == tile.chunk * tile.chunks,
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, BLOCK_L=block_l(L),
        PLANNED=plan is not None, LISTED=A.listed, RANKED=ranks is not None,
        PRECISION="ieee" if K < 32 else _device.precision(),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **_device.overlap(x.device, True),
        seed=seed, threshold=None if seed is None else threshold,
    )  # fmt: skip
    return parts


def _whole(parts: Tensor) -> Tensor:
    """The sum of a shrink's parts."""
    if parts.shape[0] == 1:
        return parts[0]
    v = torch.empty_like(parts[0])
    sum_into(v.flatten(0, 1), parts.flatten(1, 2))
    return v


class Columns(NamedTuple):
    """What an expand of one slice does beside: y is scaled by column first, the others are added; see its kernel."""

    column_scale: Tensor | None = None
    other: Tensor | None = None  # [M, N]
    other_scale: Tensor | None = None
    bias: Tensor | None = None
    v_sum: Tensor | None = None


NO_COLUMNS = Columns()


def _expand_(
    y: Tensor,
    parts: Tensor,
    B: _Factors,
    plan,
    scaling,
    ranks,
    weights,
    scale: float,
    *,
    packed: bool = False,
    summed: bool = False,
    overlap: bool = False,
    columns: Columns = NO_COLUMNS,
) -> None:
    """y += s · w · (the sum of parts ``[C, S, P, R]``) Bᵀ.

    Args:
        packed: one plane of v holds all slices, each at the ranks before it.
        summed: all slices go into the same columns.
        overlap: the kernel before is the shrink, which saw to it that all but v is there.
        columns: of one slice that is no mixture.
    """
    pairs, width = parts.shape[2], parts.shape[3]
    if not y.numel() or not parts.numel() or not B.adapters:
        return
    M = y.shape[:-1].numel()
    if pairs > M:  # a mixture: a row's pairs are in different tiles, so they meet in a sum of their own
        delta = torch.zeros(pairs, y.shape[-1], dtype=torch.float32, device=y.device)
        weights = weights.reshape(pairs, 1)
        _expand_(delta, parts, B, plan, scaling, ranks, weights, scale, packed=packed, summed=summed)
        out = reference.rows_of(y)
        sum_into(out, delta.view(M, -1, y.shape[-1]).movedim(1, 0), add=True)
    else:
        out = reference.rows_of(y)
        overlap = overlap and out.data_ptr() == y.data_ptr()  # else the kernel before is y's copy
        L, R, S = B.adapters, B.rank, len(B.widths)
        widths = B.widths[:1] if summed else B.widths
        gpu = _device.gpu(y.device)
        # What lies beside takes the registers of a second term; on AMD more warps would not divide the work.
        terms = S if summed else 1 if columns.other is None or gpu.amd else 2
        tile = expand_tiles(pairs, L, sum(widths), R, terms, B.dtype, gpu)
        per_program, v_grain = tile.block_n * tile.group, 1 if packed or width % 8 else 8
        grid = (tiles(pairs, L, tile.block_m, plan), sum(triton.cdiv(n, per_program) for n in widths))
        launch(
            expand_kernel, grid,
            out, parts, B.tensors, or_else(plan, parts), or_else(scaling, parts), or_else(ranks, parts), B.ranks,
            or_else(_flat(weights), parts), pairs, L, R, scale, widths,
            *out.stride(), B.by_adapter, B.grains, B.by_rank, width // v_grain, *_strides(scaling), *_strides(ranks),
            S=len(widths), TERMS=S if summed else 1, SPLIT=parts.shape[0], GROUP=tile.group, STAGES=tile.num_stages,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=tile.block_r, BLOCK_L=block_l(L),
            GRAIN=B.grain, V_GRAIN=v_grain,
            PLANNED=plan is not None, LISTED=B.listed, PACKED=packed, SCALED=scaling is not None,
            RANKED=ranks is not None, WEIGHTED=weights is not None, ONE_BLOCK_OF_RANKS=tile.block_r >= R,
            PRECISION=_device.precision(), num_warps=tile.num_warps, num_stages=tile.num_stages,
            **_device.overlap(y.device, overlap),
            **columns._asdict(), other_m=steps(columns.other)[0], other_n=steps(columns.other)[1],
        )  # fmt: skip
    if out.data_ptr() != y.data_ptr():
        y.copy_(out.view(y.shape))


def _add_(y: Tensor, x: Tensor, A: _Factors, B: _Factors, plan, scaling, ranks, scale: float, packed: bool) -> None:
    """y += s · (x Aᵀ) Bᵀ in one kernel."""
    rows, out = reference.rows_of(x), reference.rows_of(y)
    pairs, K, L = rows.shape[0], rows.shape[1], B.adapters
    if out.numel():
        shrink = shrink_tiles(pairs, L, K, B.rank, 1, x.dtype, A.dtype, _device.gpu(x.device))
        expand = expand_tiles(pairs, L, sum(B.widths), B.rank, 1, B.dtype, _device.gpu(x.device))
        grid = (tiles(pairs, L, shrink.block_m, plan), sum(triton.cdiv(n, expand.block_n) for n in B.widths))
        launch(
            add_kernel, grid,
            out, rows, A.tensors, B.tensors, or_else(plan, out), or_else(scaling, out), or_else(ranks, out), B.ranks,
            pairs, L, K, B.rank, scale, B.widths,
            *rows.stride(), *out.stride(), A.by_adapter, A.by_rank, A.by_column, B.by_adapter, B.grains, B.by_rank,
            *_strides(scaling), *_strides(ranks),
            S=len(B.widths), CHUNK=shrink.chunk, CHUNKS=shrink.chunks, EVEN_K=K == shrink.chunk * shrink.chunks,
            BLOCK_M=shrink.block_m, BLOCK_N=expand.block_n, BLOCK_K=shrink.block_k, BLOCK_R=shrink.block_r,
            BLOCK_L=block_l(L), GRAIN=B.grain, PLANNED=plan is not None, LISTED=B.listed, PACKED=packed,
            SCALED=scaling is not None, RANKED=ranks is not None,
            X_PRECISION="ieee" if K < 32 else _device.precision(), PRECISION=_device.precision(),
            num_warps=expand.num_warps, num_stages=shrink.num_stages,
            **_device.overlap(x.device, True),
        )  # fmt: skip
    if out.data_ptr() != y.data_ptr():
        y.copy_(out.view(y.shape))


def _expand_grad(
    dv: Tensor, dy: Tensor, v: Tensor, B: _Factors, plan, scaling, ranks, weights, scale, dtype, whole: bool
) -> Tensor:
    """dv = dy B into ``dv [P, R]``; returns dB = s Σ w dyᵀ v, ``[L, N, R]``."""
    rows = reference.rows_of(dy)
    size = expand_grad_tiles(v.shape[1], dy.dtype, B.dtype, _device.gpu(dy.device)).size
    planes, parts, _ = _expand_grad_parts(rows, v, B, plan, ranks, weights, dtype, whole, size)
    if rows.shape[1]:
        sum_into(dv, planes)
    else:
        dv.zero_()
    return _gather(parts, B.adapters, plan, scaling, scale, v.shape[0], size, dtype)


class GradColumns(NamedTuple):
    """What the gradients of an expand of one adapter make beside, see their kernel: t of ``y``, dz of a scale."""

    y: Tensor | None = None  # [M, N]
    bias: Tensor | None = None
    column_scale: Tensor | None = None
    dz: Tensor | None = None


NO_GRAD_COLUMNS = GradColumns()


def _expand_grad_parts(
    rows: Tensor,
    v: Tensor,
    B: _Factors,
    plan,
    ranks,
    weights,
    dtype: torch.dtype,
    whole: bool,
    size: int,
    *,
    need_v: bool = True,
    need_B: bool = True,
    columns: GradColumns = NO_GRAD_COLUMNS,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is to be added up of dv, dB and t: ``[C, P, R]``, ``[tiles, N, R]`` and ``[tiles, N]``, or None."""
    (pairs, R), N, L, y = v.shape, rows.shape[1], B.adapters, columns.y
    tile = expand_grad_tiles(R, rows.dtype, B.dtype, _device.gpu(rows.device), columns is not NO_GRAD_COLUMNS)
    grid = (tiles(pairs, L, size, plan), triton.cdiv(N, tile.block_n))
    make = torch.zeros if whole and plan is not None else torch.empty
    planes = make(grid[1], pairs, R, dtype=torch.float32, device=rows.device) if need_v else None
    parts = torch.empty(grid[0], N, R, dtype=torch.float32, device=rows.device) if need_B else None
    t = None if y is None else torch.empty(grid[0], N, dtype=torch.float32, device=rows.device)
    if v.numel() and grid[0] and N:
        launch(
            expand_grad_kernel, grid,
            planes, parts, rows, v, B.tensors, or_else(plan, v), or_else(ranks, v), B.ranks,
            or_else(_flat(weights), v), pairs, reference.pairs_per_row(pairs, rows.shape[0]), L, N, R,
            *rows.stride(), B.by_adapter, B.grains, B.by_rank, 0 if ranks is None else ranks.stride(0),
            SIZE=size, BLOCK_P=tile.block_p, BLOCK_N=tile.block_n, BLOCK_R=tile.block_r, BLOCK_L=block_l(L),
            GRAIN=B.grain, PLANNED=plan is not None, LISTED=B.listed, RANKED=ranks is not None,
            WEIGHTED=weights is not None, PARTS=_parts(dtype), PRECISION=_device.precision(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            t=t, **columns._asdict(), y_m=steps(y)[0], y_n=steps(y)[1],
        )  # fmt: skip
    return planes, parts, t


def _outer(u: Tensor, w: Tensor, L: int, plan, scaling, weights, scale, pairs: int, dtype: torch.dtype) -> list[Tensor]:
    """G[s][l] = s Σ w_p u[s]ᵀ w over the pairs of adapter l for u ``[S, P or M, U]``: S of ``[L, U, W]``."""
    S, size = u.shape[0], outer_tiles(u.shape[0] * u.shape[2]).size
    parts = _outer_parts(u, w, L, plan, weights, pairs, dtype, size)
    return [_gather(parts[:, s], L, plan, reference.of_slice(scaling, s), scale, pairs, size, dtype) for s in range(S)]


def _outer_parts(u: Tensor, w: Tensor, L: int, plan, weights, pairs: int, dtype: torch.dtype, size: int) -> Tensor:
    """The sums over tiles of up to ``size`` pairs: ``[tiles, S, U, W]``."""
    right = reference.rows_of(w)
    S, R, W = u.shape[0], u.shape[2], right.shape[1]
    tile = outer_tiles(S * R)
    grid = (tiles(pairs, L, size, plan), triton.cdiv(S * R, tile.block_u), triton.cdiv(W, tile.block_w))
    parts = torch.empty(grid[0], S, R, W, dtype=torch.float32, device=u.device)
    if parts.numel():
        launch(
            outer_kernel, grid,
            parts, u, right, or_else(plan, parts), or_else(_flat(weights), parts),
            pairs, reference.pairs_per_row(pairs, u.shape[1]), reference.pairs_per_row(pairs, right.shape[0]),
            L, R, S * R, W, *u.stride(), *right.stride(),
            SIZE=size, BLOCK_P=tile.block_p, BLOCK_U=tile.block_u, BLOCK_W=tile.block_w, BLOCK_L=block_l(L),
            SLICED=S > 1, PLANNED=plan is not None, WEIGHTED=weights is not None,
            PARTS=_parts(dtype), PRECISION=_device.precision(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return parts


def _gather(parts: Tensor, L: int, plan, scaling, scale: float, pairs: int, size: int, dtype) -> Tensor:
    """The tiles' parts ``[tiles, U, W]`` added up adapter by adapter and scaled: ``[L, U, W]``."""
    elements = parts.shape[1] * parts.shape[2]
    out = torch.empty(L, *parts.shape[1:], dtype=dtype, device=parts.device)
    if out.numel():
        launch(
            gather_kernel, (triton.cdiv(elements, 1024), L),
            out, parts, or_else(plan, parts), or_else(scaling, parts), pairs, L, elements, parts.stride(0), scale,
            0 if scaling is None else scaling.stride(0),
            SIZE=size, BLOCK=1024, PLANNED=plan is not None, SCALED=scaling is not None,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def steps(rows: Tensor | None) -> tuple[int | None, int | None]:
    """The strides of ``rows``."""
    return (None, None) if rows is None else (rows.stride(0), rows.stride(1))


def _parts(result: torch.dtype) -> int:
    """In how many parts fp32 by bf16 is multiplied for a result of some dtype."""
    return 3 if result == torch.float32 else 2


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.reshape(-1).float().contiguous()


def _strides(values: Tensor | None) -> tuple[int, int]:
    """(from slice to slice, from adapter to adapter) of [L] or [S, L]."""
    if values is None:
        return 0, 0
    return (0, values.stride(0)) if values.dim() == 1 else values.stride()
