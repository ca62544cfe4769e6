"""``quantized`` on the CPU: few rows by the extension's kernels, many by torch's products over panels.

A panel is a part of W in x's dtype, unpacked where it stays in a cache. Beside it lie columns that carry what is added,
the adapter and the bias, so that torch's own sum holds them and rounds once: y = [x | v | 1] [W | B | bias]ᵀ. What has
more digits than the dtype goes in as a sum of parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.low_rank import rows_of
from ._low_rank import lora_expand_

PANEL = 1 << 21  # numbers


@torch.no_grad()
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
    """y = x Wᵀ + bias + s v Bᵀ, see the reference; many rows of several adapters are rounded before they are added."""
    adapters = v, B, ids, indptr, plan, scaling, ranks, weights, scale
    compiled = torch.ops.lora_kernels_C
    base = codes, scales, offsets, table, group
    if not compiled.quantized_prefers_panels(x, *base):
        return compiled.quantized_linear(x, *base, bias, *adapters)
    N, K = codes.shape[0], x.shape[-1]
    one = v is not None and ids is plan is indptr is scaling is ranks is weights is None and v.shape[0] == 1
    left: list[Tensor] = []
    right: list[Tensor] = []
    if v is not None and one:
        b = B[0][0] if B[0].dim() == 3 else B[0]
        _beside(left, right, v[0, :, : b.shape[1]] * scale, b, x.dtype)
    if bias is not None:
        _beside(left, right, x.new_ones(1, 1).expand(math.prod(x.shape[:-1]), 1), bias[:, None], x.dtype)
    rows = torch.cat((rows_of(x), *left), 1) if left else rows_of(x)
    y = x.new_empty((*x.shape[:-1], N))  # itself, since a view could not be overwritten where it needs gradients
    flat = y.view(rows.shape[0], N)
    width = max(64, PANEL // max(K, 1) // 64 * 64)
    panel = x.new_empty((min(width, N), rows.shape[1]))
    beside = torch.cat(right, 1) if right else None
    for n in range(0, N, width):
        part = panel[: min(width, N - n)]
        torch.ops.lora_kernels.dequantize_(part[:, :K], *base, n, 0)
        if beside is not None:
            part[:, K:] = beside[n : n + width]
        torch.mm(rows, part.T, out=flat[:, n : n + width])
    if v is not None and not one:
        lora_expand_.overload(y, *adapters)
    return y


@torch.no_grad()
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
    """dx = dy W + s v A, see the reference: panels of columns of W, so that each sum over its rows is whole."""
    compiled = torch.ops.lora_kernels_C
    base = codes, scales, offsets, table, group
    if not compiled.quantized_grad_prefers_panels(dy, *base, in_features):
        return compiled.quantized_linear_grad(dy, *base, in_features, v, A, scale)
    N, K = codes.shape[0], in_features
    left: list[Tensor] = []
    right: list[Tensor] = []
    if v is not None and A is not None:
        _beside(left, right, v * scale, A.T, dy.dtype)
    rows = torch.cat((rows_of(dy), *left), 1) if left else rows_of(dy)
    dx = dy.new_empty((rows.shape[0], K))
    width = max(64, PANEL // max(N, 1) // 64 * 64)
    panel = dy.new_empty((rows.shape[1], min(width, K)))
    beside = torch.cat(right, 1).T if right else None
    for k in range(0, K, width):
        part = panel[:, : min(width, K - k)]
        torch.ops.lora_kernels.dequantize_(part[:N], *base, 0, k)
        if beside is not None:
            part[N:] = beside[:, k : k + width]
        torch.mm(rows, part, out=dx[:, k : k + width])
    return dx.view(*dy.shape[:-1], K)


def _beside(left: list[Tensor], right: list[Tensor], u: Tensor, w: Tensor, dtype: torch.dtype) -> None:
    """Columns whose products sum up to u wᵀ: of the parts of u and w all pairs but those of both their rests."""
    if dtype == torch.float16 and u.dtype == torch.float32 and u.numel() and w.numel():
        u, w = _balanced(u, w)
    (u0, *u_rest), (w0, *w_rest) = _parts(u, dtype), _parts(w, dtype)
    for a, b in [(u0, w0), *((rest, w0) for rest in u_rest), *((u0, rest) for rest in w_rest)]:
        left.append(a)
        right.append(b)


def _parts(t: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """t in ``dtype``, and what is left of it where that is not all."""
    whole = t.to(dtype)
    return [whole] if t.dtype == dtype else [whole, torch.where(whole.isfinite(), t - whole, 0).to(dtype)]


def _balanced(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of u 2ᵉ and w 2⁻ᵉ, about equally large: fp16 may be too narrow for those of u or w alone."""
    most, other = (t.float().abs().nan_to_num(0, 0, 0).amax(0).frexp().exponent for t in (u, w))
    e = (other - most) // 2
    return torch.ldexp(u, e), torch.ldexp(w, -e).to(w.dtype)
