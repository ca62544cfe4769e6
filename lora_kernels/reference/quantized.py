"""``quantized`` in plain PyTorch: linear layers whose weight is packed in 4 or 8 bits a number, with LoRA on top.

Every format is held in one form. W is [N, K] and

    W[n, k] = scales[n, k // group] · table[c[n, k]] + offsets[n, k // group]

with fp32 ``scales`` and ``offsets`` ``[N, ceil(K / group)]`` (no offsets: zero). The codes c lie in ``codes``: uint8
``[N, ceil(K / 2)]``, two in a byte, the even k's in the high half, with the fp32 ``table [16]``; or int8 ``[N, K]``
without a table, and the number is its own value. The product and the sum are rounded to fp32 each, the result once to
the dtype asked for: an NF4 or FP4 weight then has the bits that bitsandbytes gives it.

Notation otherwise as in ``low_rank``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .low_rank import accumulate_dtype, lora_expand_


def unpack_codes(codes: Tensor, columns: int) -> Tensor:
    """The codes c one by one, ``[N, columns]``, in the dtype they are in."""
    if codes.dtype == torch.int8:
        return codes[:, :columns]
    return torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)[:, :columns]


def pack_codes(c: Tensor) -> Tensor:
    """Numbers from 0 to 15 ``[N, K]`` as ``codes`` uint8 ``[N, ceil(K / 2)]``; a last odd one has 0 beside it."""
    c = torch.nn.functional.pad(c.to(torch.uint8), (0, c.shape[1] % 2))
    return c[:, ::2] << 4 | c[:, 1::2]


def dequantized(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, table: Tensor | None, group: int, columns: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W as ``[N, columns]``, rounded once to ``dtype``."""
    c = unpack_codes(codes, columns)
    value = c.float() if table is None else table[c.long()]
    at = torch.arange(columns, device=codes.device) // group
    value = value * scales[:, at]
    if offsets is not None:
        value = value + offsets[:, at]
    return value.to(dtype)


def dequantize_(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    table: Tensor | None,
    group: int,
    row: int,
    column: int,
) -> None:
    """out ← W[row : row + R, column : column + C] in out's dtype, ``[R, C]``."""
    rows = slice(row, row + out.shape[0])
    offsets = None if offsets is None else offsets[rows]
    stop = column + out.shape[1]
    out.copy_(dequantized(codes[rows], scales[rows], offsets, table, group, stop, out.dtype)[:, column:])


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    table: Tensor | None,
    group: int,
    bias: Tensor | None,
    v: Tensor | None,
    B: Sequence[Tensor],
    ids: Tensor | None,
    indptr: Tensor | None,
    plan: Tensor | None,
    scaling: Tensor | None,
    ranks: Tensor | None,
    weights: Tensor | None,
    scale: float,
) -> Tensor:
    """y = x Wᵀ + bias + s v Bᵀ in x's dtype, rounded once.

    ``v [S, P, R]`` is ``lora_shrink``'s of the same rows, and what follows it ``lora_expand_``'s arguments; None, with
    no B: no adapter.
    """
    wide = accumulate_dtype(x.dtype)
    y = x.to(wide) @ dequantized(codes, scales, offsets, table, group, x.shape[-1], wide).T
    if bias is not None:
        y += bias
    if v is not None:
        lora_expand_(y, v, B, ids, indptr, plan, scaling, ranks, weights, scale)
    return y.to(x.dtype)


def quantized_linear_grad(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    table: Tensor | None,
    group: int,
    in_features: int,
    v: Tensor | None,
    A: Tensor | None,
    scale: float,
) -> Tensor:
    """dx = dy W + s v A ``[..., K]`` in dy's dtype, rounded once; ``v [M, R]`` fp32 is dy B, ``A [R, K]``."""
    wide = accumulate_dtype(dy.dtype)
    dx = dy.to(wide) @ dequantized(codes, scales, offsets, table, group, in_features, wide)
    if v is not None and A is not None:
        dx += scale * (v.to(wide) @ A.to(wide)).view(dx.shape)
    return dx.to(dy.dtype)
