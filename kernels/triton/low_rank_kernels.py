"""The device code of ``low_rank``; ``low_rank.py`` launches it.

Factors come as a tuple of pointers: S stacks, or the matrices of L adapters (LISTED). Their strides within an adapter
come as tuples too, of one entry where all are alike.

The shrink sums K in chunks whose bounds depend on K alone, each by its own program where the batch is small; the chunks
are added in order. So a row has the same bits in every batch. Nothing waits for another program, nothing is added
atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .dropout import kept
from .grouped import dot, pairs_at, run, select


@triton.jit
def _factor(factors, stride_l, s, adapter, LISTED: tl.constexpr):
    """Where a slice's factor of an adapter begins; a tensor of pointers for a tensor s."""
    if LISTED:
        return select(factors, adapter)
    return select(factors, s) + adapter.to(tl.int64) * select(stride_l, s)


@triton.jit
def _stride(strides, s, adapter, LISTED: tl.constexpr):
    if len(strides) == 1:
        return strides[0]
    return select(strides, adapter if LISTED else s)


@triton.jit
def _rank(ranks, widths, s, adapter, R, ranks_s, ranks_l, LISTED: tl.constexpr, RANKED: tl.constexpr):
    """The live rank of a slice's factor of an adapter."""
    rank = R
    if LISTED:
        rank = select(widths, adapter)
    if RANKED:
        rank = tl.minimum(tl.load(ranks + s * ranks_s + adapter * ranks_l), rank)
    return rank


@triton.jit
def _sums(
    x_at, a_at, x_step, a_step, kk, K, wide, needed,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, key=None, threshold=None, row=None, first=None,
):  # fmt: skip
    """x Aᵀ over CHUNKS chunks of K, each summed by itself, then added in order; A is read in the columns ``wide``.

    With a ``key`` x is dropped out; its rows are ``row``, its first column ``first``.
    """
    total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    if needed:
        for i in range(0, CHUNK * CHUNKS // BLOCK_K):
            if EVEN_K:  # A first: its address is known before x's
                a_block = tl.load(a_at, mask=wide[None, :], other=0.0)
                x_block = tl.load(x_at)
            else:
                inside = kk < K
                a_block = tl.load(a_at, mask=wide[None, :] & inside[:, None], other=0.0)
                x_block = tl.load(x_at, mask=inside[None, :], other=0.0)
                kk += BLOCK_K
            if key is not None:
                mask = kept(key, threshold, row, first + i * BLOCK_K, K, BLOCK_K)
                x_block = tl.where(mask, x_block, 0.0)
            acc = dot(x_block, a_block, acc, PRECISION)
            if CHUNKS > 1:
                last = (i + 1) % (CHUNK // BLOCK_K) == 0
                total += tl.where(last, acc, 0.0)
                acc = tl.where(last, 0.0, acc)
            x_at += x_step
            a_at += a_step
    if CHUNKS == 1:
        total = acc
    return tl.where(wide[None, :], total, 0.0)


@triton.jit(do_not_specialize=("pairs", "k", "threshold"))
def shrink_kernel(
    v, x, A, plan, ranks, widths, pairs, k, L, K, R,
    x_m, x_k, a_l, a_r, a_k, ranks_s, ranks_l,
    S: tl.constexpr, SLICES: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    PLANNED: tl.constexpr, LISTED: tl.constexpr, RANKED: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    seed=None, threshold=None,
):  # fmt: skip
    """v[c, s, p, r] = the sum of x a over the CHUNKS chunks of K from chunk c · CHUNKS on, zero past the live rank.

    A program takes BLOCK_R ranks of one slice, or of SLICES slices side by side, a power of two that is at least S.
    PACKED: how many slices a stack holds one after the other, each as high as its adapter's rank. With a ``seed`` x is
    dropped out.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    adapter, start, stop = run(plan, tl.program_id(0), pairs, L, BLOCK_M, BLOCK_L, PLANNED)
    if adapter >= L:
        return
    pair, live = pairs_at(plan, start + tl.arange(0, BLOCK_M), stop, pairs, L, PLANNED)
    first_r = 0
    if SLICES > 1:
        column = tl.arange(0, SLICES * BLOCK_R)
        s = tl.minimum(column // BLOCK_R, S - 1)
        r = tl.where(column < S * BLOCK_R, column % BLOCK_R, R)
    else:
        rank_blocks = tl.cdiv(R, BLOCK_R)
        s = tl.program_id(2) // rank_blocks
        first_r = tl.program_id(2) % rank_blocks * BLOCK_R
        r = first_r + tl.arange(0, BLOCK_R)
    rank = _rank(ranks, widths, s, adapter, R, ranks_s, ranks_l, LISTED, RANKED)
    if RANKED:
        rank = tl.minimum(rank * PACKED, R)
    wide = r < rank
    kk = tl.program_id(1) * (CHUNK * CHUNKS) + tl.arange(0, BLOCK_K)
    step_k = _stride(a_k, s, adapter, LISTED)
    x_at = x + (pair // k)[:, None] * x_m + kk.to(tl.int64)[None, :] * x_k
    a_at = _factor(A, a_l, s, adapter, LISTED) + r.to(tl.int64) * _stride(a_r, s, adapter, LISTED)
    a_at = a_at[None, :] + kk.to(tl.int64)[:, None] * step_k
    a_step = tl.full([], BLOCK_K, tl.int64) * step_k
    x_step = tl.full([], BLOCK_K, tl.int64) * x_k
    needed = True
    if SLICES == 1:
        needed = first_r < rank
    key = None
    if seed is not None:
        key = tl.load(seed)
    total = _sums(
        x_at, a_at, x_step, a_step, kk, K, wide, needed,
        CHUNK, CHUNKS, EVEN_K, BLOCK_M, BLOCK_K, SLICES * BLOCK_R, PRECISION,
        key, threshold, pair // k, tl.program_id(1) * (CHUNK * CHUNKS),
    )  # fmt: skip
    plane = (tl.program_id(1) * S + s).to(tl.int64) * pairs  # [columns], or one for all
    if SLICES > 1:
        at = v + (plane[None, :] + pair[:, None]) * R + r[None, :]
    else:
        at = v + (plane + pair)[:, None] * R + r[None, :]
    tl.store(at, total, mask=live[:, None] & (r < R)[None, :])


@triton.jit
def _rank_block(at, stride, r, rank, inside, GRAIN: tl.constexpr, RANKED: tl.constexpr):
    """B's ranks r, [ranks, columns], from ``at [columns]`` on; 0 past the live rank.

    Loaded GRAIN at a time, which the padded rank is a multiple of: only so are loads wide whatever the live rank. What
    is past it is dropped.
    """
    block = tl.load(
        at[None, :] + r.to(tl.int64)[:, None] * stride,
        mask=(r // GRAIN * GRAIN < rank)[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    if RANKED and GRAIN > 1:
        block = tl.where((r < rank)[:, None], block, 0.0)
    return block


@triton.jit
def _v_block(
    v_at, r, rank, size, factor, weights, pair, live,
    SPLIT: tl.constexpr, GRAIN: tl.constexpr, WEIGHTED: tl.constexpr, sum_at=None, writes=None,
):  # fmt: skip
    """s · w · Σ_c v[c] for a tile of pairs and a block of ranks, loaded as :func:`_rank_block` loads B's.

    A program that ``writes`` stores Σ_c v[c] at ``sum_at``.
    """
    mask = live[:, None] & (r // GRAIN * GRAIN < rank)[None, :]
    v = tl.zeros([live.shape[0], r.shape[0]], tl.float32)
    for c in tl.static_range(SPLIT):
        part = tl.load((v_at + c * size)[:, None] + r[None, :], mask=mask, other=0.0)
        v = part if c == 0 else v + part
    if GRAIN > 1:
        v = tl.where((r < rank)[None, :], v, 0.0)
    if sum_at is not None:
        if writes:
            tl.store(sum_at[:, None] + r[None, :], v, mask=mask)
    v *= factor
    if WEIGHTED:
        v *= tl.load(weights + pair, mask=live, other=0.0)[:, None]
    return v


@triton.jit
def _slice_of(group, columns, S: tl.constexpr, SIZE: tl.constexpr):
    """(slice, where it begins in y, its width, which of its groups of SIZE columns) of a group of columns of y."""
    s = 0
    column = 0
    width = columns[0]
    for i in tl.static_range(1, S):
        groups = tl.cdiv(columns[i - 1], SIZE)
        if (s == i - 1) & (group >= groups):
            s = i
            column += columns[i - 1]
            group -= groups
            width = columns[i]
    return s, column, width, group


@triton.jit(do_not_specialize=("pairs", "scale"))
def expand_kernel(
    y, v, B, plan, scaling, ranks, widths, weights, pairs, L, R, scale, columns,
    y_m, y_n, b_l, b_n, b_r, v_p, scaling_s, scaling_l, ranks_s, ranks_l,
    S: tl.constexpr, TERMS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, GRAIN: tl.constexpr,
    V_GRAIN: tl.constexpr, PLANNED: tl.constexpr, LISTED: tl.constexpr, PACKED: tl.constexpr, SCALED: tl.constexpr,
    RANKED: tl.constexpr,
    WEIGHTED: tl.constexpr, ONE_BLOCK_OF_RANKS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    column_scale=None, other=None, other_m=None, other_n=None, other_scale=None, bias=None, v_sum=None,
):  # fmt: skip
    """y[p] += s · w · (Σ_c v[c, s, p]) Bᵀ for a tile of pairs and GROUP blocks of one slice's columns.

    TERMS slices are summed into the same columns. PACKED: slice s has its ranks at s · rank of one plane of v. The
    strides b_n and v_p count GRAIN and V_GRAIN elements.

    Of one slice, y is first scaled column by column, and ``other``, scaled by its own, and ``bias`` are added with the
    rest; Σ_c v[c] goes to ``v_sum``.
    """
    v_p *= V_GRAIN
    adapter, start, stop = run(plan, tl.program_id(0), pairs, L, BLOCK_M, BLOCK_L, PLANNED)
    if adapter >= L:
        if OVERLAP:
            gdc_wait()  # or nobody waits for the shrink where all programs leave
        return
    pair, live = pairs_at(plan, start + tl.arange(0, BLOCK_M), stop, pairs, L, PLANNED)
    s, column, width, group = _slice_of(tl.program_id(1), columns, S, BLOCK_N * GROUP)
    r = tl.arange(0, BLOCK_R)
    size = pairs.to(tl.int64) * v_p * (1 if PACKED else S)
    early: tl.constexpr = GROUP == 1 and ONE_BLOCK_OF_RANKS and TERMS == 1  # y and B are under way before v is there
    hoisted: tl.constexpr = GROUP > 1 and ONE_BLOCK_OF_RANKS and TERMS == 1
    rank = _rank(ranks, widths, s, adapter, R, ranks_s, ranks_l, LISTED, RANKED)
    if TERMS == 1 and rank <= 0:
        if OVERLAP:
            gdc_wait()
        return
    factor = scale
    if SCALED:
        factor *= tl.load(scaling + s * scaling_s + adapter * scaling_l)
    b_of = _factor(B, b_l, s, adapter, LISTED)
    if PACKED:
        v_at = v + pair * v_p + s * rank
    else:
        v_at = v + (pairs.to(tl.int64) * s + pair) * v_p
    sum_at = None
    if v_sum is not None:
        sum_at = v_sum + pair * v_p
    if OVERLAP and not early:
        gdc_wait()
    if hoisted:
        v_block = _v_block(
            v_at, r, rank, size, factor, weights, pair, live, SPLIT, V_GRAIN, WEIGHTED, sum_at, tl.program_id(1) == 0
        )
    for j in tl.range(0, GROUP, num_stages=STAGES):
        n = (group * GROUP + j) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (n < width)[None, :]
        y_at = y + pair[:, None] * y_m + (column + n).to(tl.int64)[None, :] * y_n
        before = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        if other is not None:
            other_at = other + pair[:, None] * other_m + n.to(tl.int64)[None, :] * other_n
            beside = tl.load(other_at, mask=inside, other=0.0).to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for term in tl.static_range(TERMS):
            if TERMS > 1:  # each anew, term 0 too: a loop carries what it assigns
                rank = _rank(ranks, widths, term, adapter, R, ranks_s, ranks_l, LISTED, RANKED)
                factor = scale
                if SCALED:
                    factor *= tl.load(scaling + term * scaling_s + adapter * scaling_l)
                b_of = _factor(B, b_l, term, adapter, LISTED)
                v_at = v + (pairs.to(tl.int64) * term + pair) * v_p
            b_at = b_of + n.to(tl.int64) * (_stride(b_n, s + term, adapter, LISTED) * GRAIN)
            step_r = _stride(b_r, s + term, adapter, LISTED)
            if ONE_BLOCK_OF_RANKS:
                b_block = _rank_block(b_at, step_r, r, rank, n < width, GRAIN, RANKED)
                if early:
                    if OVERLAP:
                        gdc_wait()
                if not hoisted:
                    v_block = _v_block(
                        v_at, r, rank, size, factor, weights, pair, live, SPLIT, V_GRAIN, WEIGHTED,
                        sum_at, tl.program_id(1) + j == 0,
                    )  # fmt: skip
                acc = dot(v_block, b_block, acc, PRECISION, 2)
            else:
                for first in range(0, rank, BLOCK_R):
                    rr = first + r
                    b_block = _rank_block(b_at, step_r, rr, rank, n < width, GRAIN, RANKED)
                    v_part = _v_block(
                        v_at, rr, rank, size, factor, weights, pair, live, SPLIT, V_GRAIN, WEIGHTED,
                        sum_at, tl.program_id(1) + j == 0,
                    )  # fmt: skip
                    acc = dot(v_part, b_block, acc, PRECISION, 2)
        if column_scale is not None:
            before *= tl.load(column_scale + n, mask=n < width, other=0.0)[None, :]
        if other is not None:
            if other_scale is not None:
                beside *= tl.load(other_scale + n, mask=n < width, other=0.0)[None, :]
            before += beside
        if bias is not None:
            before += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        tl.store(y_at, (before + acc).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("pairs", "scale"))
def add_kernel(
    y, x, A, B, plan, scaling, ranks, widths, pairs, L, K, R, scale, columns,
    x_m, x_k, y_m, y_n, a_l, a_r, a_k, b_l, b_n, b_r, scaling_s, scaling_l, ranks_s, ranks_l,
    S: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    GRAIN: tl.constexpr, PLANNED: tl.constexpr, LISTED: tl.constexpr, PACKED: tl.constexpr, SCALED: tl.constexpr,
    RANKED: tl.constexpr, X_PRECISION: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y[p] += s (x[p] Aᵀ) Bᵀ for a tile of pairs and a block of one slice's columns: each program makes v for itself.

    The bits are those of a shrink and an expand.
    """
    if OVERLAP:
        gdc_wait()
    adapter, start, stop = run(plan, tl.program_id(0), pairs, L, BLOCK_M, BLOCK_L, PLANNED)
    if adapter >= L:
        return
    pair, live = pairs_at(plan, start + tl.arange(0, BLOCK_M), stop, pairs, L, PLANNED)
    s, column, width, group = _slice_of(tl.program_id(1), columns, S, BLOCK_N)
    rank = _rank(ranks, widths, s, adapter, R, ranks_s, ranks_l, LISTED, RANKED)
    if rank <= 0:
        return
    r = tl.arange(0, BLOCK_R)
    n = group * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = live[:, None] & (n < width)[None, :]
    y_at = y + pair[:, None] * y_m + (column + n).to(tl.int64)[None, :] * y_n
    before = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    b_at = _factor(B, b_l, s, adapter, LISTED) + n.to(tl.int64) * (_stride(b_n, s, adapter, LISTED) * GRAIN)
    b_block = _rank_block(b_at, _stride(b_r, s, adapter, LISTED), r, rank, n < width, GRAIN, RANKED)
    kk = tl.arange(0, BLOCK_K)
    step_k = _stride(a_k, s, adapter, LISTED)
    first_r = s * rank if PACKED else 0
    a_at = _factor(A, a_l, 0 if PACKED else s, adapter, LISTED)
    a_at += (first_r + r).to(tl.int64) * _stride(a_r, 0 if PACKED else s, adapter, LISTED)
    v = _sums(
        x + pair[:, None] * x_m + kk.to(tl.int64)[None, :] * x_k, a_at[None, :] + kk.to(tl.int64)[:, None] * step_k,
        tl.full([], BLOCK_K, tl.int64) * x_k, tl.full([], BLOCK_K, tl.int64) * step_k, kk, K, r < rank, True,
        CHUNK, CHUNKS, EVEN_K, BLOCK_M, BLOCK_K, BLOCK_R, X_PRECISION,
    )  # fmt: skip
    factor = scale
    if SCALED:
        factor *= tl.load(scaling + s * scaling_s + adapter * scaling_l)
    acc = dot(v * factor, b_block, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, 2)
    tl.store(y_at, (before + acc).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("pairs",))
def expand_grad_kernel(
    dv, dB, dy, v, B, plan, ranks, widths, weights, pairs, k, L, N, R,
    dy_m, dy_n, b_l, b_n, b_r, ranks_l,
    SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    GRAIN: tl.constexpr, PLANNED: tl.constexpr, LISTED: tl.constexpr, RANKED: tl.constexpr, WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
    t=None, y=None, y_m=None, y_n=None, bias=None, dz=None, column_scale=None,
):  # fmt: skip
    """Both gradients that need dy, in one pass over it: for a block of columns of one slice and up to SIZE pairs,

    dv[c, p] = dy B over the columns c of the program, and dB[tile] = Σ_p w_p dyᵀ v over its pairs, in order. The stride
    b_n counts GRAIN elements.

    In the same pass t[tile] = Σ_p dy∘(y - bias) and dz = column_scale∘dy; what is None is not made.
    """
    tile = tl.program_id(0)
    adapter, start, stop = run(plan, tile, pairs, L, SIZE, BLOCK_L, PLANNED)
    if adapter >= L:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    rank = _rank(ranks, widths, 0, adapter, R, 0, ranks_l, LISTED, RANKED)
    if dv is not None:
        b_at = _factor(B, b_l, 0, adapter, LISTED) + n.to(tl.int64) * (_stride(b_n, 0, adapter, LISTED) * GRAIN)
        b_block = _rank_block(b_at, _stride(b_r, 0, adapter, LISTED), r, rank, n < N, GRAIN, RANKED)
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    if t is not None:
        products = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        shift = tl.zeros([BLOCK_N], tl.float32)
        if bias is not None:
            shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if dz is not None:
        factor = tl.load(column_scale + n, mask=n < N, other=0.0)
    for first in range(start, stop, BLOCK_P):
        pair, live = pairs_at(plan, first + tl.arange(0, BLOCK_P), stop, pairs, L, PLANNED)
        dy_at = dy + (pair // k)[:, None] * dy_m + n.to(tl.int64)[None, :] * dy_n
        dy_block = tl.load(dy_at, mask=live[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_P, BLOCK_N]
        if dB is not None:
            v_block = tl.load(v + pair[:, None] * R + r[None, :], mask=live[:, None] & (r < rank)[None, :], other=0.0)
            if WEIGHTED:
                v_block *= tl.load(weights + pair, mask=live, other=0.0)[:, None]
        if dv is not None:
            part = dot(dy_block, tl.trans(b_block), tl.zeros([BLOCK_P, BLOCK_R], tl.float32), PRECISION)
            at = dv + (tl.program_id(1).to(tl.int64) * pairs + pair)[:, None] * R + r[None, :]
            tl.store(at, part, mask=live[:, None] & (r < R)[None, :])
        if dB is not None:
            acc = dot(tl.trans(v_block), dy_block, acc, PRECISION, PARTS)
        if t is not None:
            y_at = y + (pair // k)[:, None] * y_m + n.to(tl.int64)[None, :] * y_n
            y_block = tl.load(y_at, mask=live[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
            products += dy_block.to(tl.float32) * (y_block - shift[None, :])
        if dz is not None:
            dz_at = dz + (pair // k)[:, None] * N + n[None, :]
            scaled = (dy_block.to(tl.float32) * factor[None, :]).to(dz.dtype.element_ty)
            tl.store(dz_at, scaled, mask=live[:, None] & (n < N)[None, :])
    if dB is not None:
        at = dB + (tile.to(tl.int64) * N + n[:, None]) * R + r[None, :]
        tl.store(at, tl.trans(acc), mask=(n < N)[:, None] & (r < R)[None, :])
    if t is not None:
        tl.store(t + tile.to(tl.int64) * N + n, tl.sum(products, 0), mask=n < N)


@triton.jit(do_not_specialize=("pairs", "u_pairs", "w_pairs", "u_s"))
def outer_kernel(
    out, u, w, plan, weights, pairs, u_pairs, w_pairs, L, R, U, W,
    u_s, u_p, u_c, w_p, w_c,
    SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr,
    SLICED: tl.constexpr, PLANNED: tl.constexpr, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[tile] = Σ_p w_p u_pᵀ w_p over up to SIZE pairs of an adapter, in order.

    Column c of u is rank c % R of slice c // R.
    """
    tile = tl.program_id(0)
    adapter, start, stop = run(plan, tile, pairs, L, SIZE, BLOCK_L, PLANNED)
    if adapter >= L:
        return
    c = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    wc = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    if SLICED:
        u_of = u + (c // R).to(tl.int64) * u_s + (c % R) * u_c
    else:
        u_of = u + c.to(tl.int64) * u_c
    acc = tl.zeros([BLOCK_U, BLOCK_W], tl.float32)
    for first in range(start, stop, BLOCK_P):
        pair, live = pairs_at(plan, first + tl.arange(0, BLOCK_P), stop, pairs, L, PLANNED)
        u_at = u_of[:, None] + (pair // u_pairs)[None, :] * u_p
        u_block = tl.load(u_at, mask=live[None, :] & (c < U)[:, None], other=0.0)
        w_at = w + (pair // w_pairs)[:, None] * w_p + wc.to(tl.int64)[None, :] * w_c
        w_block = tl.load(w_at, mask=live[:, None] & (wc < W)[None, :], other=0.0)
        if WEIGHTED:
            u_block = u_block.to(tl.float32) * tl.load(weights + pair, mask=live, other=0.0)[None, :]
        acc = dot(u_block, w_block, acc, PRECISION, PARTS)
    at = out + (tile.to(tl.int64) * U + c[:, None]) * W + wc[None, :]
    tl.store(at, acc, mask=(c < U)[:, None] & (wc < W)[None, :])


@triton.jit(do_not_specialize=("pairs", "scale"))
def gather_kernel(
    out, parts, plan, scaling, pairs, L, size, step, scale, scaling_l,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PLANNED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out[l] = s Σ parts[tile] over the tiles of adapter l, in order, rounded once; zero where it has none.

    A result has ``size`` elements, the tiles' parts begin ``step`` elements apart.
    """
    l = tl.program_id(1)
    start = 0
    stop = tl.where(l == 0, pairs, 0)
    if PLANNED:
        start = tl.load(plan + 2 + l)
        stop = tl.where(tl.load(plan + 1) == L, tl.load(plan + 3 + l), start)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = parts + (start // SIZE + l).to(tl.int64) * step + i
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(start, stop, SIZE):
        acc += tl.load(at, mask=i < size, other=0.0)
        at += step
    factor = scale
    if SCALED:
        factor *= tl.load(scaling + l * scaling_l)
    tl.store(out + l.to(tl.int64) * size + i, (acc * factor).to(out.dtype.element_ty), mask=i < size)
