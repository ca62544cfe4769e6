"""The device code of ``spectral``; ``spectral.py`` launches it.

A program takes a block of rows of x and walks the entries of S that it owns, whose numbers of x it gathers. Where
entries are many the numbers of BLOCK_M rows stand side by side (BLOCKED: [blocks of rows, K, BLOCK_M]), so that a
gather reads whole lines of the cache; where they are few, making that copy would take longer than they do.

One level of the Haar transform is two numbers for one, so it is taken where numbers are gathered and where they are
stored; its factors √½ are in the callers' ``scale``. What an entry is added to depends on its place alone, so a call
has the same bits twice; nothing waits for another program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows",))
def block_kernel(out, x, rows, features, x_m, x_k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[b, k, i] = x[b · BLOCK_M + i, k], and 0 past the last row."""
    block, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_M)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    m = block * BLOCK_M + i
    x_block = tl.load(x + m * x_m + k.to(tl.int64) * x_k, mask=(m < rows) & (k < features), other=0.0)
    tl.store(out + (block * features + k) * BLOCK_M + i, x_block, mask=k < features)


@triton.jit
def numbers(x, feature, live, features, x_k, HAAR: tl.constexpr):
    """Each row's transformed number at a feature, 0 where not ``live``; x points to the rows' first numbers."""
    if HAAR:
        half = (features + 1) // 2
        low = feature < half
        first = 2 * tl.where(low, feature, feature - half)
        at = x + first.to(tl.int64) * x_k
        even = tl.load(at, mask=live, other=0.0).to(tl.float32)
        odd = tl.load(at + x_k, mask=live & (first + 1 < features), other=0.0).to(tl.float32)
        return even + tl.where(low, odd, -odd)
    number = tl.load(x + feature.to(tl.int64) * x_k, mask=live, other=0.0)
    return number.to(tl.float32)


@triton.jit
def rows_at(x, block, x_b, x_m, BLOCK_M: tl.constexpr, BLOCKED: tl.constexpr):
    """Pointers to the first numbers of a block's rows of x, [1, BLOCK_M]."""
    i = tl.arange(0, BLOCK_M)[None, :]
    if not BLOCKED:
        i = i.to(tl.int64) * x_m
    return x + block.to(tl.int64) * x_b + i


@triton.jit
def present(live, m, rows, BLOCKED: tl.constexpr):
    """Which of the live numbers are of rows that there are; a blocked copy has zeros past them."""
    if not BLOCKED:
        live &= m < rows
    return live


@triton.jit
def row_sums(
    first, stop, by_row, values, x, m, rows, length, entries, features, x_k,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, HAAR: tl.constexpr, BLOCKED: tl.constexpr,
):  # fmt: skip
    """The rows of S from ``first`` on and before ``stop`` by rows of x, [BLOCK_R, BLOCK_M]; BLOCK_E entries a step."""
    lane = tl.arange(0, BLOCK_R * BLOCK_E)
    row = first + lane // BLOCK_E
    place = tl.load(by_row + row, mask=row < stop, other=0) + lane % BLOCK_E
    end = tl.load(by_row + row + 1, mask=row < stop, other=0)
    columns = by_row + length + 1
    acc = tl.zeros([BLOCK_R * BLOCK_E, BLOCK_M], tl.float32)
    for _ in range(0, tl.max(end - place), BLOCK_E):
        live = place < end
        column = tl.load(columns + place, mask=live, other=0)
        coefficient = tl.load(columns + entries + place, mask=live, other=0)
        index = tl.where(coefficient < 0, -1 - coefficient, coefficient)
        value = tl.load(values + index, mask=live, other=0.0).to(tl.float32)
        value = tl.where(coefficient < 0, -value, value)
        inside = present(live[:, None], m, rows, BLOCKED)
        acc += value[:, None] * numbers(x, column[:, None], inside, features, x_k, HAAR)
        place += BLOCK_E
    if BLOCK_E > 1:
        acc = tl.sum(tl.reshape(acc, [BLOCK_R, BLOCK_E, BLOCK_M]), 1)
    return acc


@triton.jit(do_not_specialize=("rows", "scale"))
def product_kernel(
    out, y, x, by_row, values, rows, columns, length, entries, features, scale, x_b, x_m, x_k, y_m, y_n,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, HAAR: tl.constexpr, BLOCKED: tl.constexpr,
):  # fmt: skip
    """out = (y or 0) + scale · x Sᵀ, rounded once; with HAAR, x and the product transformed."""
    height = length  # of S, in rows that are summed by themselves or with those half of all rows further on
    if HAAR:
        height = length // 2
    blocks = tl.cdiv(height, BLOCK_R)
    first, block = tl.program_id(0) % blocks * BLOCK_R, tl.program_id(0) // blocks
    m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows_at(x, block, x_b, x_m, BLOCK_M, BLOCKED)
    acc = row_sums(
        first, height, by_row, values, at, m[None, :], rows, length, entries, features, x_k,
        BLOCK_R, BLOCK_E, BLOCK_M, HAAR, BLOCKED,
    )  # fmt: skip
    if HAAR:
        detail = row_sums(
            first + height, length, by_row, values, at, m[None, :], rows, length, entries, features, x_k,
            BLOCK_R, BLOCK_E, BLOCK_M, HAAR, BLOCKED,
        )  # fmt: skip
        acc = tl.interleave(tl.trans(acc + detail), tl.trans(acc - detail)) * scale
        n = 2 * first + tl.arange(0, 2 * BLOCK_R)[None, :]
    else:
        acc = tl.trans(acc) * scale
        n = first + tl.arange(0, BLOCK_R)[None, :]
    m = m[:, None]
    here = (m < rows) & (n < columns)
    if y is not None:
        before = tl.load(y + m * y_m + n.to(tl.int64) * y_n, mask=here, other=0.0)
        acc += before.to(tl.float32)
    out_at = out + m * columns + n
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=here)


@triton.jit
def row_of(by_row, place, length, bits):
    """The row of S that each entry is in, by bisection of where rows begin; ``bits``: of ``length``."""
    low = tl.zeros_like(place)
    high = low + length
    for _ in range(bits):
        middle = (low + high) // 2
        right = tl.load(by_row + middle) <= place
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit(do_not_specialize=("rows", "steps"))
def dot_kernel(
    parts, g, x, by_row, rows, length, entries, bits, steps, g_features, x_features, g_b, g_m, g_k, x_b, x_m, x_k,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, HAAR: tl.constexpr, BLOCKED: tl.constexpr,
):  # fmt: skip
    """parts[c, e] = Σ g[m, row of e] x[m, column of e] over ``steps`` blocks of rows m from block c · steps on."""
    place = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    live = place < entries
    row = row_of(by_row, place, length, bits)[:, None]
    column = tl.load(by_row + length + 1 + place, mask=live, other=0)[:, None]
    block = tl.program_id(1) * steps
    m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    g_at = rows_at(g, block, g_b, g_m, BLOCK_M, BLOCKED)
    x_at = rows_at(x, block, x_b, x_m, BLOCK_M, BLOCKED)
    acc = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    for _ in range(block, tl.minimum(block + steps, tl.cdiv(rows, BLOCK_M))):
        inside = present(live[:, None], m, rows, BLOCKED)
        number = numbers(g_at, row, inside, g_features, g_k, HAAR)
        acc += number * numbers(x_at, column, inside, x_features, x_k, HAAR)
        g_at += g_b
        x_at += x_b
        m += BLOCK_M
    tl.store(parts + tl.program_id(1).to(tl.int64) * entries + place, tl.sum(acc, 1), mask=live)


@triton.jit(do_not_specialize=("chunks", "scale"))
def fold_kernel(
    dvalues, parts, by_row, length, entries, chunks, scale, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """dvalues += scale · (parts[0] + parts[1] + ...) of each coefficient's entries, by their signs.

    A coefficient has one entry, or two, and 0 + a + b has the same bits in both orders: so it may be added atomically.
    """
    place = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    live = place < entries
    total = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for first in range(0, chunks, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[:, None]
        part = tl.load(parts + c.to(tl.int64) * entries + place[None, :], mask=(c < chunks) & live[None, :], other=0.0)
        total += part
    coefficient = tl.load(by_row + length + 1 + entries + place, mask=live, other=0)
    negative = coefficient < 0
    at = dvalues + tl.where(negative, -1 - coefficient, coefficient)
    tl.atomic_add(at, tl.sum(total, 0) * tl.where(negative, -scale, scale), mask=live, sem="relaxed")
