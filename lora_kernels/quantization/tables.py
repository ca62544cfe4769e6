"""The values of 4-bit codes."""

from __future__ import annotations

#: NF4 (Dettmers et al., QLoRA, arXiv 2305.14314): the quantiles of a normal distribution, as bitsandbytes rounds them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

#: FP4 in bitsandbytes' order of codes: the sign in the highest bit, eighths and their like over 12.
FP4 = tuple(
    sign * value / 12 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)  # fmt: skip

#: INT4 with the zero point apart.
INT4 = tuple(float(code) for code in range(16))
