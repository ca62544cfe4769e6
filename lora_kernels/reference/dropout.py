"""Dropout from a seed: a mask that is made again wherever it is needed and stored nowhere.

Element (m, k) of x [M, K] takes half word j = k mod 8 of the block that Philox-4x32 with 7 rounds makes of the counter
m ⌈K/8⌉ + ⌊k/8⌋ under the key ``seed``: its words in order, the low half of each first. The element is kept where the
half word is at least t = round(p 2¹⁶), so p is a multiple of 2⁻¹⁶.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), for Philox; its 7 rounds pass BigCrush.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """t: the half words below it are dropped."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """1 / (1 - t 2⁻¹⁶), what kept elements are scaled by; 0 where none is kept."""
    t = threshold(p)
    return 65536 / (65536 - t) if t < 65536 else 0.0


def philox(counter: Tensor, key: Tensor) -> list[Tensor]:
    """Philox-4x32-7 of 64-bit counters and a 64-bit key, all int64: four words, int64 each."""
    zero = torch.zeros_like(counter)
    c = [counter & _WORD, (counter >> 32) & _WORD, zero, zero]
    k = [key & _WORD, (key >> 32) & _WORD]
    for _ in range(ROUNDS):
        products = [m * x for m, x in zip(_MULTIPLIERS, (c[0], c[2]), strict=True)]  # modulo 2⁶⁴, as it should be
        high, low = ([(p >> shift) & _WORD for p in products] for shift in (32, 0))
        c = [high[1] ^ c[1] ^ k[0], low[1], high[0] ^ c[3] ^ k[1], low[0]]
        k = [(x + w) & _WORD for x, w in zip(k, _WEYL, strict=True)]
    return c


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of x [rows, columns] are kept: bool, on the device of ``seed`` (int64, one element)."""
    blocks = -(-columns // 8)
    counter = torch.arange(rows * blocks, dtype=torch.int64, device=seed.device)
    words = philox(counter, seed.reshape(()))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], 1)
    return (halves >= threshold(p)).view(rows, blocks * 8)[:, :columns]
