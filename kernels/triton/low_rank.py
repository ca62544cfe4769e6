"""``low_rank`` in Triton: the ops of ``lora_kernels.reference.low_rank`` with the same arguments, for GPU tensors.

Pairs of a row and an adapter come sorted by adapter from a plan table; a tile is up to BLOCK_M pairs of one adapter, so
there are no padding rows and an adapter's factors are read once a tile. A grid is sized by what a batch of its length
can need at most; programs past the last tile leave after one look at the plan. Nothing waits for another program,
nothing is added atomically, and no value is read back on the host, so a captured graph serves any ids.

The shrink sums K in chunks whose bounds depend on K alone, each by its own program where the batch is small; the chunks
are added in order. So a row has the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl
from lora_kernels.reference import low_rank as reference
from lora_kernels.select import expand_tiles, outer_tiles, shrink_tiles
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import _device

HEADER = tl.constexpr(3)  # of a plan table, besides its L offsets: P, L and the last offset


@triton.jit
def _select(values, s, S: tl.constexpr):
    """values[s] for a number known only at run time."""
    chosen = values[0]
    for i in tl.static_range(1, S):
        if s == i:
            chosen = values[i]
    return chosen


@triton.jit
def _tile(plan, tile, pairs, L, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, PLANNED: tl.constexpr):
    """(adapter, its pairs in this tile, which of them exist); the adapter is L where the tile is empty."""
    m = tl.arange(0, BLOCK_M)
    if PLANNED:
        # Adapter l has tile slots from start_l // BLOCK_M + l on: enough, in order, and found without a prefix sum.
        adapter = -1
        for first in range(0, L, BLOCK_L):
            l = first + tl.arange(0, BLOCK_L)
            start = tl.load(plan + 2 + l, mask=l < L, other=0)
            adapter += tl.sum(((l < L) & (start // BLOCK_M + l <= tile)).to(tl.int32))
        matches = (tl.load(plan + 1) == L) & (adapter >= 0)  # a plan of other adapters has none of these
        start = tl.load(plan + 2 + adapter, mask=matches, other=0)
        stop = tl.load(plan + 3 + adapter, mask=matches, other=0)
        start += (tile - start // BLOCK_M - adapter) * BLOCK_M
        adapter = tl.where(start < stop, adapter, L)
        position = start + m
        pair = tl.load(plan + HEADER + L + position, mask=position < stop, other=0)
        live = (position < stop) & (pair < pairs)
    else:
        adapter = tile * 0
        pair = tile * BLOCK_M + m
        live = pair < pairs
    return adapter, tl.where(live, pair, 0).to(tl.int64), live


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32: 16-bit operands of one dtype as they are, all others at fp32's precision."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def _dot_fp32(v, b, acc, PRECISION: tl.constexpr):
    """acc + v b for fp32 v; with bf16 b as two products, v's upper and lower halves."""
    if b.dtype == tl.bfloat16:
        upper = v.to(tl.bfloat16)
        lower = tl.where(tl.abs(v) < float("inf"), v - upper.to(tl.float32), 0.0).to(tl.bfloat16)
        return tl.dot(upper, b, tl.dot(lower, b, acc))
    return tl.dot(v, b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=("pairs", "segments", "bits"))
def plan_kernel(
    table, ids, indptr, pairs, segments, bits, L,
    BLOCK: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """One program an adapter: counts the pairs of the adapters before it, then lists its own in order."""
    l = tl.program_id(0)
    lower = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        id_ = _id(ids, indptr, first + tl.arange(0, BLOCK), pairs, segments, bits, SEGMENTED)
        lower += ((id_ >= 0) & (id_ < l)).to(tl.int32)
    start = tl.sum(lower)
    stop = start
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        id_ = _id(ids, indptr, pair, pairs, segments, bits, SEGMENTED)
        mine = (id_ == l) & (id_ < L)
        place = stop + tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(table + HEADER + L + place, pair, mask=mine)
        stop += tl.sum(mine.to(tl.int32))
    if l < L:
        tl.store(table + 2 + l, start)
    if l + 1 >= L:
        tl.store(table + 2 + L, stop)
        tl.store(table + 1, L)
        if SEGMENTED:
            tl.store(table, tl.load(indptr + segments).to(tl.int32))
        else:
            tl.store(table, pairs)


@triton.jit
def _id(ids, indptr, pair, pairs, segments, bits, SEGMENTED: tl.constexpr):
    """The id of each pair, -1 where there is none."""
    if SEGMENTED:
        low = tl.zeros_like(pair)  # how many bounds lie at or before the row, by bisection
        high = low + segments + 1
        for _ in range(bits):
            middle = (low + high) // 2
            bound = tl.load(indptr + middle, mask=middle <= segments, other=0)
            right = (low < high) & (bound <= pair)
            high = tl.where(right, high, middle)
            low = tl.where(right, middle + 1, low)
        inside = (pair < pairs) & (low >= 1) & (low <= segments)
        return tl.load(ids + low - 1, mask=inside, other=-1)
    return tl.load(ids + pair, mask=pair < pairs, other=-1)


@triton.jit(do_not_specialize=("pairs", "k"))
def shrink_kernel(
    v, x, A, plan, ranks, pairs, k, L, K, R,
    x_m, x_k, a_l, a_r, a_k, ranks_s, ranks_l,
    S: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    PLANNED: tl.constexpr, RANKED: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """v[c, s, p, r] = the sum of x a over the CHUNKS chunks of K from chunk c · CHUNKS on, zero past the live rank."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    adapter, pair, live = _tile(plan, tl.program_id(0), pairs, L, BLOCK_M, BLOCK_L, PLANNED)
    if adapter >= L:
        return
    rank_blocks = tl.cdiv(R, BLOCK_R)
    s = tl.program_id(2) // rank_blocks
    r = tl.program_id(2) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = R
    if RANKED:
        rank = tl.minimum(tl.load(ranks + s * ranks_s + adapter * ranks_l), R)
    wide = r < rank
    kk = tl.program_id(1) * (CHUNK * CHUNKS) + tl.arange(0, BLOCK_K)
    x_at = x + (pair // k)[:, None] * x_m + kk.to(tl.int64)[None, :] * x_k
    a_at = _select(A, s, S) + adapter.to(tl.int64) * _select(a_l, s, S)
    a_at += r.to(tl.int64)[None, :] * a_r + kk.to(tl.int64)[:, None] * a_k
    x_step = tl.full([], BLOCK_K, tl.int64) * x_k
    a_step = tl.full([], BLOCK_K, tl.int64) * a_k
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if tl.program_id(2) % rank_blocks * BLOCK_R < rank:
        for i in range(0, CHUNK * CHUNKS // BLOCK_K):
            if EVEN_K:  # A first: its address is known before x's
                a_block = tl.load(a_at, mask=wide[None, :], other=0.0)
                x_block = tl.load(x_at)
            else:
                inside = kk < K
                a_block = tl.load(a_at, mask=wide[None, :] & inside[:, None], other=0.0)
                x_block = tl.load(x_at, mask=inside[None, :], other=0.0)
                kk += BLOCK_K
            acc = _dot(x_block, a_block, acc, PRECISION)
            if CHUNKS > 1:
                last = (i + 1) % (CHUNK // BLOCK_K) == 0
                total += tl.where(last, acc, 0.0)
                acc = tl.where(last, 0.0, acc)
            x_at += x_step
            a_at += a_step
    if CHUNKS == 1:
        total = acc
    at = v + ((tl.program_id(1) * S + s).to(tl.int64) * pairs + pair)[:, None] * R + r[None, :]
    tl.store(at, tl.where(wide[None, :], total, 0.0), mask=live[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=("size", "SPLIT"))
def sum_kernel(total, parts, size, SPLIT, BLOCK: tl.constexpr):
    """total = parts[0] + parts[1] + ..., in this order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(parts + at, mask=at < size)
    for _ in range(1, SPLIT):
        parts += size
        acc += tl.load(parts + at, mask=at < size)
    tl.store(total + at, acc, mask=at < size)


@triton.jit
def _v_block(v_at, r, rank, size, factor, weights, pair, live, SPLIT: tl.constexpr, WEIGHTED: tl.constexpr):
    """s · w · Σ_c v[c] for a tile of pairs and a block of ranks."""
    mask = live[:, None] & (r < rank)[None, :]
    v = tl.load(v_at + r[None, :], mask=mask, other=0.0)
    for c in tl.static_range(1, SPLIT):
        v += tl.load(v_at + r[None, :] + c * size, mask=mask, other=0.0)
    v *= factor
    if WEIGHTED:
        v *= tl.load(weights + pair, mask=live, other=0.0)[:, None]
    return v


@triton.jit(do_not_specialize=("pairs", "scale"))
def expand_kernel(
    y, v, B, plan, scaling, ranks, weights, pairs, L, R, scale, widths,
    y_m, y_n, b_l, b_n, b_r, scaling_s, scaling_l, ranks_s, ranks_l,
    S: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    PLANNED: tl.constexpr, SCALED: tl.constexpr, RANKED: tl.constexpr, WEIGHTED: tl.constexpr,
    ONE_BLOCK_OF_RANKS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y[p] += s · w · (Σ_c v[c, s, p]) Bᵀ for a tile of pairs and GROUP blocks of one slice's columns."""
    adapter, pair, live = _tile(plan, tl.program_id(0), pairs, L, BLOCK_M, BLOCK_L, PLANNED)
    if adapter >= L:
        if OVERLAP:
            gdc_wait()  # or nobody waits for the shrink where all programs leave
        return
    group = tl.program_id(1)
    s = 0
    column = 0  # of y, where the slice begins
    width = widths[0]
    for i in tl.static_range(1, S):
        groups = tl.cdiv(widths[i - 1], BLOCK_N * GROUP)
        if (s == i - 1) & (group >= groups):
            s = i
            column += widths[i - 1]
            group -= groups
            width = widths[i]
    rank = R
    if RANKED:
        rank = tl.minimum(tl.load(ranks + s * ranks_s + adapter * ranks_l), R)
    if rank <= 0:
        if OVERLAP:
            gdc_wait()
        return
    factor = scale
    if SCALED:
        factor *= tl.load(scaling + s * scaling_s + adapter * scaling_l)
    b_of = _select(B, s, S) + adapter.to(tl.int64) * _select(b_l, s, S)
    v_at = v + (s.to(tl.int64) * pairs + pair)[:, None] * R
    size = pairs.to(tl.int64) * R * S
    r = tl.arange(0, BLOCK_R)
    early: tl.constexpr = GROUP == 1 and ONE_BLOCK_OF_RANKS  # y and B are under way before v is there
    if OVERLAP and not early:
        gdc_wait()
    if ONE_BLOCK_OF_RANKS and not early:
        v_block = _v_block(v_at, r, rank, size, factor, weights, pair, live, SPLIT, WEIGHTED)
    for j in tl.range(0, GROUP, num_stages=STAGES):
        n = (group * GROUP + j) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (n < width)[None, :]
        y_at = y + pair[:, None] * y_m + (column + n).to(tl.int64)[None, :] * y_n
        b_at = b_of + n.to(tl.int64)[None, :] * b_n
        before = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ONE_BLOCK_OF_RANKS:
            b_block = tl.load(
                b_at + r.to(tl.int64)[:, None] * b_r, mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0
            )
            if early:
                if OVERLAP:
                    gdc_wait()
                v_block = _v_block(v_at, r, rank, size, factor, weights, pair, live, SPLIT, WEIGHTED)
            acc = _dot_fp32(v_block, b_block, acc, PRECISION)
        else:
            for first in range(0, rank, BLOCK_R):
                rr = first + r
                b_block = tl.load(
                    b_at + rr.to(tl.int64)[:, None] * b_r, mask=(rr < rank)[:, None] & (n < width)[None, :], other=0.0
                )
                v_part = _v_block(v_at, rr, rank, size, factor, weights, pair, live, SPLIT, WEIGHTED)
                acc = _dot_fp32(v_part, b_block, acc, PRECISION)
        tl.store(y_at, (before + acc).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("pairs", "scale", "u_pairs", "w_pairs"))
def outer_kernel(
    out, u, w, plan, scaling, weights, pairs, u_pairs, w_pairs, L, U, W, scale,
    u_p, u_c, w_p, w_c, scaling_l,
    BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_W: tl.constexpr,
    PLANNED: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[l] = s Σ w_p u_pᵀ w_p over the pairs of adapter l, in order, for one block of the result."""
    l = tl.program_id(0)
    start = 0
    stop = tl.where(l == 0, pairs, 0)
    if PLANNED:
        start = tl.load(plan + 2 + l)
        stop = tl.where(tl.load(plan + 1) == L, tl.load(plan + 3 + l), start)
    uc = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    wc = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    acc = tl.zeros([BLOCK_U, BLOCK_W], tl.float32)
    for first in range(start, stop, BLOCK_P):
        position = first + tl.arange(0, BLOCK_P)
        live = position < stop
        pair = position
        if PLANNED:
            pair = tl.load(plan + HEADER + L + position, mask=live, other=0)
        live &= pair < pairs
        u_at = u + (pair // u_pairs).to(tl.int64)[None, :] * u_p + uc.to(tl.int64)[:, None] * u_c
        u_block = tl.load(u_at, mask=live[None, :] & (uc < U)[:, None], other=0.0)
        w_at = w + (pair // w_pairs).to(tl.int64)[:, None] * w_p + wc.to(tl.int64)[None, :] * w_c
        w_block = tl.load(w_at, mask=live[:, None] & (wc < W)[None, :], other=0.0)
        if WEIGHTED:
            u_block = u_block.to(tl.float32) * tl.load(weights + pair, mask=live, other=0.0)[None, :]
        acc = _dot(u_block, w_block, acc, PRECISION)
    factor = scale
    if SCALED:
        factor *= tl.load(scaling + l * scaling_l)
    at = out + (l.to(tl.int64) * U + uc[:, None]) * W + wc[None, :]
    tl.store(at, acc * factor, mask=(uc < U)[:, None] & (wc < W)[None, :])


def lora_plan_(table: Tensor, ids: Tensor, indptr: Tensor | None, num_adapters: int) -> None:
    """Write the plan of ``ids`` into ``table`` in one kernel."""
    ids = ids.reshape(-1).contiguous()
    segmented = indptr is not None
    segments = ids.numel()
    pairs = table.numel() - num_adapters - 3 if segmented else segments
    indptr = indptr.contiguous() if segmented else ids
    with _device.on(table):
        plan_kernel[(max(num_adapters, 1),)](
            table, ids, indptr, pairs, segments, (segments + 1).bit_length(), num_adapters,
            BLOCK=min(max(triton.next_power_of_2(pairs), 32), 1024), SEGMENTED=segmented,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


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
    if x.dtype == torch.float64:
        return reference.lora_shrink(x, A, ids, indptr, plan, ranks, pairs)
    A = _stacked(A, -2)
    with _device.on(x):
        plan = _planned(pairs, A[0].shape[0], ids, indptr, plan, x)
        parts = _shrink(x, A, plan, ranks, pairs, whole=True)
        if parts.shape[0] == 1:
            return parts[0]
        v = torch.empty_like(parts[0])
        if v.numel():
            grid = (triton.cdiv(v.numel(), 1024),)
            sum_kernel[grid](
                v, parts, v.numel(), parts.shape[0], BLOCK=1024, num_warps=4, num_stages=1, enable_fp_fusion=True
            )
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
    if v.dtype == torch.float64:
        return reference.lora_expand_(y, v, B, ids, indptr, plan, scaling, ranks, weights, scale)
    B = _stacked(B, -1)
    with _device.on(y):
        plan = _planned(v.shape[1], B[0].shape[0], ids, indptr, plan, y)
        _expand_(y, v.contiguous()[None], B, plan, scaling, ranks, weights, scale)


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
    if x.dtype == torch.float64:
        return reference.lora_add_(y, x, A, B, ids, indptr, plan, scaling, ranks, weights, scale)
    A, B = _stacked(A, -2), _stacked(B, -1)
    rows = x.shape[:-1].numel()
    pairs = weights.numel() if weights is not None else reference.num_pairs(rows, ids, indptr)
    with _device.on(x):
        plan = _planned(pairs, A[0].shape[0], ids, indptr, plan, x)
        parts = _shrink(x, A, plan, ranks, pairs, whole=False)
        _expand_(y, parts, B, plan, scaling, ranks, weights, scale, overlap=True)


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
    if torch.float64 in (u.dtype, w.dtype):
        return reference.lora_outer(u, w, num_adapters, ids, indptr, plan, scaling, weights, scale, pairs)
    left, right = reference.rows_of(u), reference.rows_of(w)
    U, W = left.shape[1], right.shape[1]
    out = torch.empty(num_adapters, U, W, dtype=torch.float32, device=u.device)
    if not out.numel():
        return out
    with _device.on(u):
        plan = _planned(pairs, num_adapters, ids, indptr, plan, u)
        tiles = outer_tiles(U, W)
        grid = (num_adapters, triton.cdiv(U, tiles.block_u), triton.cdiv(W, tiles.block_w))
        outer_kernel[grid](
            out, left, right, _or(plan, out), _or(scaling, out), _or(_flat(weights), out),
            pairs, reference.pairs_per_row(pairs, left.shape[0]),
            reference.pairs_per_row(pairs, right.shape[0]), num_adapters, U, W, scale,
            *left.stride(), *right.stride(), 0 if scaling is None else scaling.stride(0),
            BLOCK_P=tiles.block_p, BLOCK_U=tiles.block_u, BLOCK_W=tiles.block_w,
            PLANNED=plan is not None, SCALED=scaling is not None, WEIGHTED=weights is not None,
            PRECISION=_device.precision(),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _shrink(x: Tensor, A: Sequence[Tensor], plan, ranks, pairs: int, whole: bool) -> Tensor:
    """The parts of v, ``[C, S, P, R]``, to be added in order; ``whole`` = also zero for pairs without an adapter."""
    rows = reference.rows_of(x)
    L, R, K = A[0].shape
    S, k = len(A), reference.pairs_per_row(pairs, rows.shape[0])
    tiles = shrink_tiles(pairs, L, K, R, x.dtype, A[0].dtype, _device.gpu(x.device))
    make = torch.zeros if not L or (whole and plan is not None) else torch.empty
    parts = make(tiles.split, S, pairs, R, dtype=torch.float32, device=x.device)
    if not parts.numel() or not L:
        return parts
    grid = (_tiles(pairs, L, tiles.block_m, plan), tiles.split, S * triton.cdiv(R, tiles.block_r))
    shrink_kernel[grid](
        parts, rows, A, _or(plan, parts), _or(ranks, parts), pairs, k, L, K, R,
        *rows.stride(), tuple(a.stride(0) for a in A), *A[0].stride()[1:], *_strides(ranks),
        S=S, CHUNK=tiles.chunk, CHUNKS=tiles.chunks // tiles.split, EVEN_K=K == tiles.chunk * tiles.chunks,
        BLOCK_M=tiles.block_m, BLOCK_K=tiles.block_k, BLOCK_R=tiles.block_r, BLOCK_L=_block_l(L),
        PLANNED=plan is not None, RANKED=ranks is not None, PRECISION="ieee" if K < 32 else _device.precision(),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        **_device.overlap(x.device, True),
    )  # fmt: skip
    return parts


def _expand_(
    y: Tensor, parts: Tensor, B: Sequence[Tensor], plan, scaling, ranks, weights, scale: float, overlap: bool = False
) -> None:
    """``overlap``: the kernel before is the shrink, which saw to it that all but v is there."""
    split, S, pairs, R = parts.shape
    if not y.numel() or not parts.numel() or not B[0].shape[0]:
        return
    M = y.shape[:-1].numel()
    if pairs > M:  # a mixture: a row's pairs are in different tiles, so they meet in a sum of their own
        delta = torch.zeros(pairs, y.shape[-1], dtype=torch.float32, device=y.device)
        _expand_(delta, parts, B, plan, scaling, ranks, weights.reshape(pairs, 1), scale)
        y.copy_((y.reshape(M, -1).float() + delta.view(M, -1, y.shape[-1]).sum(1)).reshape(y.shape))
        return
    out = reference.rows_of(y)
    overlap = overlap and out.data_ptr() == y.data_ptr()  # else the kernel before is y's copy
    L, widths = B[0].shape[0], tuple(b.shape[1] for b in B)
    tiles = expand_tiles(pairs, L, R, B[0].dtype)
    columns = tiles.block_n * tiles.group
    grid = (_tiles(pairs, L, tiles.block_m, plan), sum(triton.cdiv(n, columns) for n in widths))
    expand_kernel[grid](
        out, parts, B, _or(plan, parts), _or(scaling, parts), _or(ranks, parts), _or(_flat(weights), parts),
        pairs, L, R, scale, widths,
        *out.stride(), tuple(b.stride(0) for b in B), *B[0].stride()[1:], *_strides(scaling), *_strides(ranks),
        S=S, SPLIT=split, GROUP=tiles.group, STAGES=tiles.num_stages,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r, BLOCK_L=_block_l(L),
        PLANNED=plan is not None, SCALED=scaling is not None, RANKED=ranks is not None, WEIGHTED=weights is not None,
        ONE_BLOCK_OF_RANKS=tiles.block_r >= R, PRECISION=_device.precision(),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        **_device.overlap(y.device, overlap),
    )  # fmt: skip
    if out.data_ptr() != y.data_ptr():
        y.copy_(out.view(y.shape))


def _planned(pairs: int, L: int, ids, indptr, plan, like: Tensor) -> Tensor | None:
    """The plan's table: the one given, or of ids, or None where every row uses adapter 0."""
    if plan is not None or ids is None:
        return plan
    table = torch.empty(L + 3 + pairs, dtype=torch.int32, device=like.device)
    lora_plan_(table, ids, indptr, L)
    return table


def _tiles(pairs: int, L: int, block_m: int, plan: Tensor | None) -> int:
    """The most tiles that ``pairs`` pairs of ``L`` adapters can make."""
    if plan is None:
        return triton.cdiv(pairs, block_m)
    return pairs // block_m + L


def _stacked(factors: Sequence[Tensor], rank_axis: int) -> tuple[Tensor, ...]:
    """The factors as S stacks whose matrices have the same strides in every slice; a list is padded into one stack."""
    if factors[0].dim() == 3:
        if len({f.stride()[1:] for f in factors}) > 1:
            # A clone: contiguous() leaves strides of a size of one as they are.
            factors = [f.clone(memory_format=torch.contiguous_format) for f in factors]
        return tuple(factors)
    if len(factors) == 1:
        return (factors[0][None],)
    R = max(f.shape[rank_axis] for f in factors)
    size = [len(factors), *factors[0].shape]
    size[rank_axis] = R
    stack = factors[0].new_zeros(size)
    for l, f in enumerate(factors):
        stack[l].narrow(rank_axis, 0, f.shape[rank_axis]).copy_(f)
    return (stack,)


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.reshape(-1).float().contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that a kernel does not follow, where there is no tensor."""
    return other if tensor is None else tensor


def _strides(values: Tensor | None) -> tuple[int, int]:
    """(from slice to slice, from adapter to adapter) of [L] or [S, L]."""
    if values is None:
        return 0, 0
    return (0, values.stride(0)) if values.dim() == 1 else values.stride()


def _block_l(L: int) -> int:
    return min(max(triton.next_power_of_2(L), 16), 1024)
