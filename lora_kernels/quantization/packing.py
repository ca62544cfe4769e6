"""Codes of 4 bits in the words of other formats."""

from __future__ import annotations

import torch
from torch import Tensor

#: How many 4-bit codes a word of 32 bits holds.
WORD = 8


def words_of(c: Tensor) -> Tensor:
    """Numbers from 0 to 15 uint8 [..., 8 n] as int32 [..., n], the first of eight in the lowest bits."""
    low, high = c[..., ::2], c[..., 1::2]
    return _dense(high << 4 | low).flatten().view(torch.int32).view(*c.shape[:-1], c.shape[-1] // WORD)


def of_words(words: Tensor) -> Tensor:
    """The inverse of :func:`words_of`."""
    data = _dense(words).view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def _dense(t: Tensor) -> Tensor:
    """A copy with its shape's own strides: a contiguous tensor may have others where a size is 1, and then no view."""
    return t.clone(memory_format=torch.contiguous_format)
