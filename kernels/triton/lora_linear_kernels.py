"""The device code of ``lora_linear`` beside that of ``low_rank``; ``lora_linear.py`` launches both."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import kept
from .grouped import dot


@triton.jit(do_not_specialize=("rows", "scale", "threshold"))
def in_grad_kernel(
    dx, dA, dv, x, A, seed, rows, K, R, scale, threshold,
    dx_m, dx_k, x_m, x_k, a_r, a_k,
    SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ONE_BLOCK_OF_RANKS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both gradients that x's dropout is of, in one pass over x and dx: for a block of columns and up to SIZE rows,

    dx += s mask∘(dv A), rounded once, and dA[tile] = Σ_m dvᵀ x̃ over its rows m, in order; what is None is not made.

    Of several blocks of ranks each program makes one of dA, and they take turns at dx's blocks of rows.
    """
    tile, turn = tl.program_id(0), tl.program_id(2)
    first_k = tl.program_id(1) * BLOCK_K
    kk = first_k + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    r = turn * BLOCK_R + ranks
    a_at = A + kk.to(tl.int64)[None, :] * a_k
    if dx is not None and ONE_BLOCK_OF_RANKS:
        a_block = tl.load(
            a_at + r.to(tl.int64)[:, None] * a_r, mask=(r < R)[:, None] & (kk < K)[None, :], other=0.0
        )  # [BLOCK_R, BLOCK_K]
    if seed is not None:
        key = tl.load(seed)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    start = tile * SIZE
    stop = tl.minimum(start + SIZE, rows)
    for first in range(start, stop, BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        live = m < stop
        inside = live[:, None] & (kk < K)[None, :]
        if seed is not None:
            mask = kept(key, threshold, m, first_k, K, BLOCK_K)
        v_block = tl.load(dv + m[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
        if dA is not None:
            x_block = tl.load(x + m[:, None] * x_m + kk.to(tl.int64)[None, :] * x_k, mask=inside, other=0.0)
            if seed is not None:
                x_block = tl.where(mask, x_block, 0.0)
            acc = dot(tl.trans(v_block), x_block, acc, PRECISION, PARTS)
        if dx is not None:
            dx_at = dx + m[:, None] * dx_m + kk.to(tl.int64)[None, :] * dx_k
            if ONE_BLOCK_OF_RANKS:
                before = tl.load(dx_at, mask=inside, other=0.0).to(tl.float32)
                step = dot(v_block, a_block, tl.zeros([BLOCK_M, BLOCK_K], tl.float32), PRECISION, 2)
                if seed is not None:
                    step = tl.where(mask, step, 0.0)
                tl.store(dx_at, (before + scale * step).to(dx.dtype.element_ty), mask=inside)
            elif first // BLOCK_M % tl.num_programs(2) == turn:
                before = tl.load(dx_at, mask=inside, other=0.0).to(tl.float32)
                step = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
                for first_r in range(0, R, BLOCK_R):
                    rr = first_r + ranks
                    a_part = tl.load(
                        a_at + rr.to(tl.int64)[:, None] * a_r, mask=(rr < R)[:, None] & (kk < K)[None, :], other=0.0
                    )
                    v_part = tl.load(
                        dv + m[:, None] * R + rr[None, :], mask=live[:, None] & (rr < R)[None, :], other=0.0
                    )
                    step = dot(v_part, a_part, step, PRECISION, 2)
                if seed is not None:
                    step = tl.where(mask, step, 0.0)
                tl.store(dx_at, (before + scale * step).to(dx.dtype.element_ty), mask=inside)
    if dA is not None:
        at = dA + (tile.to(tl.int64) * R + r[:, None]) * K + kk[None, :]
        tl.store(at, acc, mask=(r < R)[:, None] & (kk < K)[None, :])


@triton.jit
def _add_up(out, parts, size, count, scale, block, BLOCK: tl.constexpr):
    """A block of out = s (parts[0] + parts[1] + ...), in this order, where there is such a block."""
    if (block >= 0) & (block < tl.cdiv(size, BLOCK)):
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at = parts + i
        acc = tl.zeros([BLOCK], tl.float32)
        for _ in range(count):
            acc += tl.load(at, mask=i < size, other=0.0)
            at += size
        tl.store(out + i, acc * scale, mask=i < size)


@triton.jit(do_not_specialize=("a_count", "a_scale", "b_count", "b_scale", "c_count", "c_scale"))
def add_up_kernel(
    a, a_parts, a_size, a_count, a_scale, b, b_parts, b_size, b_count, b_scale, c, c_parts, c_size, c_count, c_scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to three sums of parts of one size, fp32, in one launch; of a, b and c those that are None are not there."""
    block = tl.program_id(0)
    _add_up(a, a_parts, a_size, a_count, a_scale, block, BLOCK)
    if b is not None:
        block -= tl.cdiv(a_size, BLOCK)
        _add_up(b, b_parts, b_size, b_count, b_scale, block, BLOCK)
    if c is not None:
        block -= tl.cdiv(b_size, BLOCK)
        _add_up(c, c_parts, c_size, c_count, c_scale, block, BLOCK)


@triton.jit(do_not_specialize=("rows", "threshold"))
def dropout_kernel(
    out, x, seed, rows, K, threshold, x_m, x_k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = mask∘x for a block of rows and one of columns; out's rows lie side by side."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first_k = tl.program_id(1) * BLOCK_K
    kk = first_k + tl.arange(0, BLOCK_K)
    inside = (m < rows)[:, None] & (kk < K)[None, :]
    block = tl.load(x + m[:, None] * x_m + kk.to(tl.int64)[None, :] * x_k, mask=inside, other=0.0)
    key = tl.load(seed)
    block = tl.where(kept(key, threshold, m, first_k, K, BLOCK_K), block, 0.0)
    tl.store(out + m[:, None] * K + kk[None, :], block, mask=inside)
