"""The mask of ``lora_kernels.reference.dropout`` in a tile: each kernel that needs it makes it again."""

from __future__ import annotations

import triton
import triton.language as tl
from lora_kernels.reference import dropout

ROUNDS = tl.constexpr(dropout.ROUNDS)


@triton.jit
def kept(key, threshold, row, first, columns, WIDTH: tl.constexpr):
    """Which elements of x [rows, columns] are kept, in its rows ``row`` (int64) and WIDTH columns from ``first`` on.

    ``first`` and WIDTH are multiples of 8: Philox is computed once for 8 elements.
    """
    group = first // 8 + tl.arange(0, WIDTH // 8)
    counter = row[:, None] * tl.cdiv(columns, 8) + group[None, :]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    none = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(key, low, high, none, none, ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2 a + b at [.., a, b]
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [row.shape[0], WIDTH]) >= threshold.to(tl.uint32)
