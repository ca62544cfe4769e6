"""The device code of ``transforms``; ``transforms.py`` launches it.

A row of N = L Q numbers is a matrix of L rows, and its transform a product with a small matrix from the left, one with
another from the right, and what is done to each number between and after them. So a transform is two products on
matrix units, with N (L + Q) multiply-adds and not N². A program has all columns of one or several rows of x, and some
rows of the product from the left. Nothing waits for another program, nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped import dot


@triton.jit
def _halves(t):
    """t in two parts of bf16."""
    high = t.to(tl.bfloat16)
    rest = tl.where(tl.abs(t) < float("inf"), t - high.to(tl.float32), 0.0)
    return high, rest.to(tl.bfloat16)


@triton.jit
def _product(table, low, at, inside, t, acc, PRECISION: tl.constexpr):
    """acc + table[at] t; of 16 bits a table has its numbers in two parts, the second ``low`` further on."""
    part = tl.load(table + at, mask=inside, other=0.0)
    if part.dtype == tl.float32:
        acc = tl.dot(part, t.to(tl.float32), acc, input_precision=PRECISION)
    else:
        rest = tl.load(table + low + at, mask=inside, other=0.0)
        if t.dtype == tl.float32:
            high, remainder = _halves(t)
            acc = tl.dot(part, high, tl.dot(part, remainder, tl.dot(rest, high, acc)))
        else:
            acc = tl.dot(part, t, tl.dot(rest, t, acc))
    return acc


@triton.jit(do_not_specialize=("rows", "scale"))
def hadamard_kernel(
    y, x, left, right, rows, L, Q, width, x_m, x_n, scale,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, i, q] = scale · the sum of left[i, j] x[m, j, p] right[p, q] over j and p, for rows of L Q numbers.

    left and right have entries ±1, which bf16 and fp16 hold. Where there is a ``right``, Q is BLOCK_Q.
    """
    PARTS: tl.constexpr = 3 if y.dtype.element_ty == tl.float32 else 2
    column = tl.arange(0, BLOCK_M * BLOCK_Q)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + column // BLOCK_Q
    q = tl.program_id(2) * BLOCK_Q + column % BLOCK_Q
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    live = (m < rows) & (q < Q)
    acc = tl.zeros([BLOCK_I, BLOCK_M * BLOCK_Q], tl.float32)
    for first in range(0, L, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        x_at = x + (m * x_m)[None, :] + (j[:, None] * Q + q[None, :]).to(tl.int64) * x_n
        x_block = tl.load(x_at, mask=(j < L)[:, None] & live[None, :], other=0.0)
        signs = tl.load(left + i[:, None] * width + j[None, :], mask=(i < L)[:, None] & (j < width)[None, :], other=0.0)
        if x.dtype.element_ty == tl.float16:
            signs = signs.to(tl.float16)
        acc = dot(signs, x_block, acc, PRECISION, PARTS)
    if right is None:
        y_at = y + (m * L * Q)[None, :] + i[:, None] * Q + q[None, :]
        tl.store(y_at, (acc * scale).to(y.dtype.element_ty), mask=(i < L)[:, None] & live[None, :])
    else:
        p = tl.arange(0, BLOCK_Q)
        signs = tl.load(right + p[:, None] * BLOCK_Q + p[None, :])
        nothing = tl.zeros([BLOCK_I * BLOCK_M, BLOCK_Q], tl.float32)
        out = dot(tl.reshape(acc, [BLOCK_I * BLOCK_M, BLOCK_Q]), signs, nothing, PRECISION, PARTS) * scale
        row = tl.arange(0, BLOCK_I * BLOCK_M)
        m = tl.program_id(0).to(tl.int64) * BLOCK_M + row % BLOCK_M
        i = tl.program_id(1) * BLOCK_I + row // BLOCK_M
        y_at = y + ((m * L + i) * BLOCK_Q)[:, None] + p[None, :]
        tl.store(y_at, out.to(y.dtype.element_ty), mask=((i < L) & (m < rows))[:, None])


@triton.jit
def _place(n, N, FOLDED: tl.constexpr):
    """Where a row has the number that is n-th in the order of its transform: evens, then odds backwards."""
    if FOLDED:
        return tl.where(2 * n < N, 2 * n, 2 * (N - n) - 1)
    return n


@triton.jit
def _turn(turns, k, N, first, rest, inside):
    """(a, b) of y_k = a C_k + b S_k."""
    scale = tl.where(k == 0, first, rest)
    a = tl.load(turns + k, mask=inside, other=0.0)
    b = tl.load(turns + N + k, mask=inside, other=0.0)
    return a * scale, b * scale


@triton.jit
def _left_at(k1, n1, N1, width, GATHER: tl.constexpr):
    """Where ``left`` has the angle of k1 and n1: that of k1 n1 and 1 where it has only these."""
    if GATHER:
        return (k1.to(tl.int64) * n1 % N1).to(tl.int32)
    return k1 * width + n1


@triton.jit
def _twiddle(twiddles, k1, n2, N1, N2, width, inside):
    """Cosines and sines of 2π n2 k1 / N."""
    at = n2 * width + k1
    cosines = tl.load(twiddles + at, mask=inside, other=0.0)
    sines = tl.load(twiddles + N2 * width + at, mask=inside, other=0.0)
    return cosines, sines


@triton.jit
def _rotated(right, C, S, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr):
    """(C c - S s, C s + S c) for the cosines c and sines s in ``right``, [2, (2,) BLOCK_Q, BLOCK_Q], symmetric."""
    q = tl.arange(0, BLOCK_Q)
    at = q[:, None] * BLOCK_Q + q[None, :]
    inside = (q < BLOCK_Q)[:, None] & (q < BLOCK_Q)[None, :]
    SIZE: tl.constexpr = BLOCK_Q * BLOCK_Q
    sines = right + SIZE * (1 if right.dtype.element_ty == tl.float32 else 2)
    nothing = tl.zeros([BLOCK_Q, C.shape[1]], tl.float32)
    real = _product(right, SIZE, at, inside, C, _product(sines, SIZE, at, inside, -S, nothing, PRECISION), PRECISION)
    imaginary = _product(
        right, SIZE, at, inside, S, _product(sines, SIZE, at, inside, C, nothing, PRECISION), PRECISION
    )
    return real, imaginary


@triton.jit(do_not_specialize=("rows", "first", "rest"))
def trigonometric_kernel(
    y, x, left, twiddles, right, turns, rows, N, N1, N2, size, width, turned, first, rest, x_m, x_n,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_Q: tl.constexpr,
    FOLDED: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = D T x: the cosines C_k and sines S_k of each row by two products, and y_k and y_{N - k} of each pair of them.

    With n = N2 n1 + n2 and k = k1 + N1 k2 the angle nk / N is, but for turns, n1 k1 / N1 + n2 k1 / N + n2 k2 / N2:
    ``left``, ``twiddles`` and ``right`` have the cosines and sines of each part. k1 goes to N1 / 2: the rest are the
    N - k. Where N2 is 1 there is no ``right``.
    """
    column = tl.arange(0, BLOCK_M * BLOCK_Q)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + column // BLOCK_Q
    n2 = column % BLOCK_Q
    live = (m < rows) & (n2 < N2)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    PARTS: tl.constexpr = 1 if left.dtype.element_ty == tl.float32 else 2
    C = tl.zeros([BLOCK_I, BLOCK_M * BLOCK_Q], tl.float32)
    S = tl.zeros([BLOCK_I, BLOCK_M * BLOCK_Q], tl.float32)
    for begin in range(0, N1, BLOCK_J):
        n1 = begin + tl.arange(0, BLOCK_J)
        at = _place(n1[:, None] * N2 + n2[None, :], N, FOLDED)
        x_at = x + (m * x_m)[None, :] + at.to(tl.int64) * x_n
        x_block = tl.load(x_at, mask=(n1 < N1)[:, None] & live[None, :], other=0.0)
        at = _left_at(i[:, None], n1[None, :], N1, width, GATHER)
        inside = (i <= N1 // 2)[:, None] & (n1 < width)[None, :]
        C = _product(left, size, at, inside, x_block, C, PRECISION)
        S = _product(left + PARTS * size, size, at, inside, x_block, S, PRECISION)
    # [k1, (m, n2)] to [n2, (m, k1)]
    C = tl.reshape(tl.permute(tl.reshape(C, [BLOCK_I, BLOCK_M, BLOCK_Q]), (2, 1, 0)), [BLOCK_Q, BLOCK_M * BLOCK_I])
    S = tl.reshape(tl.permute(tl.reshape(S, [BLOCK_I, BLOCK_M, BLOCK_Q]), (2, 1, 0)), [BLOCK_Q, BLOCK_M * BLOCK_I])
    column = tl.arange(0, BLOCK_M * BLOCK_I)
    m = (tl.program_id(0).to(tl.int64) * BLOCK_M + column // BLOCK_I)[None, :]
    k1 = (tl.program_id(1) * BLOCK_I + column % BLOCK_I)[None, :]
    k2 = tl.arange(0, BLOCK_Q)[:, None]
    inside = (m < rows) & (k1 <= N1 // 2) & (k2 < N2)
    if right is not None:
        cosines, sines = _twiddle(twiddles, k1, k2, N1, N2, turned, inside)
        C, S = _rotated(right, C * cosines - S * sines, C * sines + S * cosines, BLOCK_Q, PRECISION)
    k = k1 + N1 * k2
    a, b = _turn(turns, k, N, first, rest, inside)
    y_at = y + m * N + k
    tl.store(y_at, (a * C + b * S).to(y.dtype.element_ty), mask=inside)
    inside &= (k1 > 0) & (2 * k1 < N1)
    a, b = _turn(turns, N - k, N, first, rest, inside)
    paired_at = y + m * N + (N - k)
    tl.store(paired_at, (a * C - b * S).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "first", "rest"))
def trigonometric_transpose_kernel(
    y, x, left, twiddles, right, turns, rows, N, N1, N2, size, width, turned, first, rest, x_m, x_n,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_Q: tl.constexpr,
    FOLDED: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = (D T)ᵀ x: what :func:`trigonometric_kernel` does, each step transposed and in reverse.

    The steps before the last are done again by each program of a row, of which there are few.
    """
    n1 = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    k2 = tl.arange(0, BLOCK_Q)[:, None]
    column = tl.arange(0, BLOCK_M * BLOCK_I)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_M + column // BLOCK_I)[None, :]
    PARTS: tl.constexpr = 1 if left.dtype.element_ty == tl.float32 else 2
    acc = tl.zeros([BLOCK_J, BLOCK_M * BLOCK_Q], tl.float32)
    for begin in range(0, N1 // 2 + 1, BLOCK_I):
        k1 = (begin + column % BLOCK_I)[None, :]
        k = k1 + N1 * k2
        inside = (row < rows) & (k1 <= N1 // 2) & (k2 < N2)
        a, b = _turn(turns, k, N, first, rest, inside)
        x_block = tl.load(x + row * x_m + k.to(tl.int64) * x_n, mask=inside, other=0.0).to(tl.float32)
        paired = inside & (k1 > 0) & (2 * k1 < N1)
        paired_a, paired_b = _turn(turns, N - k, N, first, rest, paired)
        paired_block = tl.load(x + row * x_m + (N - k).to(tl.int64) * x_n, mask=paired, other=0.0).to(tl.float32)
        C = a * x_block + paired_a * paired_block
        S = b * x_block - paired_b * paired_block
        if right is not None:
            # Of -S the first product has C c + S s, the second C s - S c.
            C, S = _rotated(right, C, -S, BLOCK_Q, PRECISION)
            cosines, sines = _twiddle(twiddles, k1, k2, N1, N2, turned, inside)
            C, S = C * cosines - S * sines, -(C * sines + S * cosines)
        # [n2, (m, k1)] to [k1, (m, n2)]
        C = tl.reshape(tl.permute(tl.reshape(C, [BLOCK_Q, BLOCK_M, BLOCK_I]), (2, 1, 0)), [BLOCK_I, BLOCK_M * BLOCK_Q])
        S = tl.reshape(tl.permute(tl.reshape(S, [BLOCK_Q, BLOCK_M, BLOCK_I]), (2, 1, 0)), [BLOCK_I, BLOCK_M * BLOCK_Q])
        i = begin + tl.arange(0, BLOCK_I)
        at = _left_at(i[None, :], n1[:, None], N1, width, GATHER)
        known = (i <= N1 // 2)[None, :] & (n1 < width)[:, None]
        acc = _product(left, size, at, known, C, acc, PRECISION)
        acc = _product(left + PARTS * size, size, at, known, S, acc, PRECISION)
    column = tl.arange(0, BLOCK_M * BLOCK_Q)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + column // BLOCK_Q
    n2 = column % BLOCK_Q
    at = _place(n1[:, None] * N2 + n2[None, :], N, FOLDED)
    y_at = y + (m * N)[None, :] + at
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=(n1 < N1)[:, None] & ((m < rows) & (n2 < N2))[None, :])


@triton.jit(do_not_specialize=("rows",))
def haar_kernel(
    y, low, x, rows, lengths, x_m, x_n, y_m, low_m,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The levels of a block of x: the high halves to y, the last low half to ``low``.

    ``lengths``: of x's rows and of the low halves of each level.
    """
    m = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    begin = tl.program_id(1) * BLOCK
    j = begin + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + m * x_m + j.to(tl.int64) * x_n, mask=(m < rows) & (j < lengths[0]), other=0.0).to(tl.float32)
    for level in tl.static_range(1, len(lengths)):
        a, b = tl.split(tl.reshape(value, [BLOCK_M, BLOCK >> level, 2]))
        j = (begin >> level) + tl.arange(0, BLOCK >> level)[None, :]
        pair = j < lengths[level - 1] - lengths[level]
        value = tl.where(pair, (a + b) * 0.7071067811865476, a)
        high_at = y + m * y_m + lengths[level] + j
        tl.store(high_at, ((a - b) * 0.7071067811865476).to(y.dtype.element_ty), mask=(m < rows) & pair)
    low_at = low + m * low_m + j
    tl.store(low_at, value.to(low.dtype.element_ty), mask=(m < rows) & (j < lengths[len(lengths) - 1]))


@triton.jit(do_not_specialize=("rows",))
def haar_transpose_kernel(
    y, low, x, rows, lengths, x_m, x_n, low_m, low_n,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of y from its last low half, in ``low``, and the high halves, in x."""
    LEVELS: tl.constexpr = len(lengths) - 1
    m = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    begin = tl.program_id(1) * BLOCK
    j = (begin >> LEVELS) + tl.arange(0, BLOCK >> LEVELS)[None, :]
    live = (m < rows) & (j < lengths[LEVELS])
    value = tl.load(low + m * low_m + j.to(tl.int64) * low_n, mask=live, other=0.0).to(tl.float32)
    for step in tl.static_range(LEVELS):
        pair = j < lengths[LEVELS - 1 - step] - lengths[LEVELS - step]
        high_at = x + m * x_m + (lengths[LEVELS - step] + j).to(tl.int64) * x_n
        high = tl.load(high_at, mask=(m < rows) & pair, other=0.0).to(tl.float32)
        a = tl.where(pair, (value + high) * 0.7071067811865476, value)
        b = (value - high) * 0.7071067811865476
        value = tl.reshape(tl.join(a, b), [BLOCK_M, BLOCK >> (LEVELS - 1 - step)])
        j = (begin >> (LEVELS - 1 - step)) + tl.arange(0, BLOCK >> (LEVELS - 1 - step))[None, :]
    y_at = y + m * lengths[0] + j
    tl.store(y_at, value.to(y.dtype.element_ty), mask=(m < rows) & (j < lengths[0]))
