"""The device code of ``quantized``; ``quantized.py`` launches it.

A block of W is unpacked where it is multiplied: its bytes are read once, the table's numbers are gathered from shared
memory, scaled in fp32 and rounded to the other factor's dtype. The two numbers of a byte stay in one thread, side by
side, which is how a tensor core takes them, so that putting them in order moves nothing.

A long sum for few rows is shared by programs, each with a plane of its own; the planes are added in order. Nothing
waits for another program, nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped import dot


@triton.jit
def weight_block(
    codes, scales, offsets, values, n, first, N, K, group, groups, codes_n, dtype: tl.constexpr,
    BLOCK: tl.constexpr, ONE_GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """W[n, first : first + BLOCK] in ``dtype`` for an even ``first``; the last row again for an n past N.

    ONE_GROUP: the block is all of one group. EVEN: it ends before K; else what is past K is 0.
    """
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    k = first + tl.arange(0, BLOCK)[None, :]
    if values is None:
        code_at = codes + row * codes_n + k
        if EVEN:
            code = tl.load(code_at)
        else:
            code = tl.load(code_at, mask=k < K, other=0)
        value = code.to(tl.float32)
    else:
        byte = first // 2 + tl.arange(0, BLOCK // 2)[None, :]
        code_at = codes + row * codes_n + byte
        if EVEN:
            code = tl.load(code_at)
        else:
            code = tl.load(code_at, mask=2 * byte < K, other=0)
        index = tl.interleave(code >> 4, code & 15).to(tl.int32)
        value = tl.gather(values, tl.reshape(index, [index.shape[0] * BLOCK]), 0)
        value = tl.reshape(value, [index.shape[0], BLOCK])
    at = row * groups
    if ONE_GROUP:
        at += first // group
    else:
        at += tl.minimum(k, K - 1) // group
    scale = tl.load(scales + at)
    value *= scale
    if offsets is not None:
        offset = tl.load(offsets + at)
        value += offset
    if not EVEN:
        value = tl.where(k < K, value, 0.0)
    return value.to(dtype)


@triton.jit(do_not_specialize=("row", "rows"))
def dequantize_kernel(
    out, codes, scales, offsets, table, row, column, rows, columns, N, K, group, groups, codes_n, out_m, out_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONE_GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out[m, k] = W[row + m, column + k] for a block of rows and one of BLOCK_K columns of W; not for fused adds."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (column // BLOCK_K + tl.program_id(1)) * BLOCK_K
    values = None
    if table is not None:
        values = tl.load(table + tl.arange(0, 16))
    weight = weight_block(
        codes, scales, offsets, values, row + m, first, N, K, group, groups, codes_n, out.dtype.element_ty,
        BLOCK_K, ONE_GROUP, EVEN,
    )  # fmt: skip
    k = first - column + tl.arange(0, BLOCK_K)
    at = out + m.to(tl.int64)[:, None] * out_m + k.to(tl.int64)[None, :] * out_k
    tl.store(at, weight, mask=(m < rows)[:, None] & ((k >= 0) & (k < columns))[None, :])


@triton.jit(do_not_specialize=("rows", "steps", "scale"))
def linear_kernel(
    y, x, codes, scales, offsets, table, bias, v, B, rows, N, K, R, group, groups, steps, scale,
    x_m, x_k, codes_n, b_n, b_r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ONE_GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[c, m, n] = the sum of x w over ``steps`` blocks of K from block c · steps on; y[0] has bias and s v Bᵀ too.

    The tile is that of yᵀ = W xᵀ: a tensor core takes its first operand from registers, where W is unpacked, and few
    rows need not fill the height of its tile.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    wide, live = (n < N)[:, None], (m < rows)[None, :]
    begin = tl.program_id(2) * steps * BLOCK_K
    values = None
    if table is not None:
        values = tl.load(table + tl.arange(0, 16))
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(begin, tl.minimum(begin + steps * BLOCK_K, K), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x_at = x + m[None, :] * x_m + k.to(tl.int64)[:, None] * x_k
        if EVEN:
            x_block = tl.load(x_at, mask=live, other=0.0)
        else:
            x_block = tl.load(x_at, mask=(k < K)[:, None] & live, other=0.0)
        weight = weight_block(
            codes, scales, offsets, values, n, first, N, K, group, groups, codes_n, x.dtype.element_ty,
            BLOCK_K, ONE_GROUP, EVEN,
        )  # fmt: skip
        acc = dot(weight, x_block, acc, PRECISION)
    if tl.program_id(2) == 0:
        if v is not None:
            for first in range(0, R, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                b_at = B + n.to(tl.int64)[:, None] * b_n + r.to(tl.int64)[None, :] * b_r
                b_block = tl.load(b_at, mask=wide & (r < R)[None, :], other=0.0)
                v_block = tl.load(v + m[None, :] * R + r[:, None], mask=(r < R)[:, None] & live, other=0.0)
                acc = dot(b_block, v_block * scale, acc, PRECISION, 2)
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y_at = y + (tl.program_id(2) * rows.to(tl.int64) + m)[:, None] * N + n[None, :]
    tl.store(y_at, tl.trans(acc).to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=("rows", "steps", "scale"))
def linear_grad_kernel(
    dx, dy, codes, scales, offsets, table, v, A, rows, N, K, R, group, groups, steps, scale,
    dy_m, dy_n, codes_n, a_r, a_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ONE_GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx[c, m, k] = the sum of dy w over ``steps`` blocks of N from block c · steps on; dx[0] has s v A too."""
    first_k = tl.program_id(0) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    wide, live = (k < K)[None, :], (m < rows)[:, None]
    begin = tl.program_id(2) * steps * BLOCK_N
    values = None
    if table is not None:
        values = tl.load(table + tl.arange(0, 16))
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(begin, tl.minimum(begin + steps * BLOCK_N, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        dy_at = dy + m[:, None] * dy_m + n.to(tl.int64)[None, :] * dy_n
        dy_block = tl.load(dy_at, mask=live & (n < N)[None, :], other=0.0)
        weight = weight_block(
            codes, scales, offsets, values, n, first_k, N, K, group, groups, codes_n, dy.dtype.element_ty,
            BLOCK_K, ONE_GROUP, EVEN,
        )  # fmt: skip
        acc = dot(dy_block, weight, acc, PRECISION)
    if v is not None:
        if tl.program_id(2) == 0:
            for first in range(0, R, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                a_at = A + r.to(tl.int64)[:, None] * a_r + k.to(tl.int64)[None, :] * a_k
                a_block = tl.load(a_at, mask=(r < R)[:, None] & wide, other=0.0)
                v_block = tl.load(v + m[:, None] * R + r[None, :], mask=live & (r < R)[None, :], other=0.0)
                acc = dot(v_block * scale, a_block, acc, PRECISION, 2)
    dx_at = dx + (tl.program_id(2) * rows.to(tl.int64) + m)[:, None] * K + k[None, :]
    tl.store(dx_at, acc.to(dx.dtype.element_ty), mask=live & wide)
