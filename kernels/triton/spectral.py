"""``spectral`` in Triton: the ops of ``lora_kernels.ops._spectral`` with the same arguments, for GPU tensors.

Rows of x are transformed in fp32 by the ops of ``transforms``, multiplied by S in one kernel, and transformed back.
Where the second transform is none, or a Haar level, that kernel adds y and rounds too; so the kinds ``identity`` and
``haar`` are one kernel. Many entries read a copy of the rows that has a number of several rows side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton
from lora_kernels.ops import _transforms
from lora_kernels.ops._spectral import delta_weight, weight_grad
from lora_kernels.reference import spectral as reference
from lora_kernels.reference.low_rank import rows_of
from lora_kernels.select import SpectralTiles, spectral_dot_tiles, spectral_tiles

from . import _device
from ._repeat import launch
from .spectral_kernels import block_kernel, dot_kernel, fold_kernel, product_kernel


def spectral_linear(
    x: Tensor,
    values: Tensor,
    by_row: Tensor,
    y: Tensor | None,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    out_features: int,
    scale: float,
) -> Tensor:
    """(y or 0) + x ΔWᵀ, see the reference."""
    M, N, K = x.shape[:-1].numel(), out_features, x.shape[-1]
    if not M or not N or not K:
        return reference.spectral_linear(x, values, by_row, y, signs, orders, kind, N, scale)
    T = reference.Transforms(kind, signs, orders, _transforms)
    dtype = x.dtype if y is None else y.dtype
    with _device.on(x):
        S = _Entries(by_row, reference.length_of(kind, N))
        tile = spectral_tiles(M, S.length, S.count, K)
        u = _laid(_transformed_x(T, x), tile)
        if kind not in _TWO_SIDED:
            before = None if y is None else rows_of(y)
            out = torch.empty(*x.shape[:-1], N, dtype=dtype, device=x.device)
            _product(out.view(M, N), before, u, S, values, T, scale, tile)
            return out
        v = torch.empty(M, N, dtype=torch.float32, device=x.device)
        _product(v, None, u, S, values, T, scale, tile)
        delta = T.of_y(v, transpose=True).view(*x.shape[:-1], N)
        return delta.to(dtype) if y is None else torch.add(y, delta, out=torch.empty_like(delta, dtype=dtype))


def spectral_add_(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    by_row: Tensor,
    ids: Tensor,
    scaling: Tensor | None,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    scale: float,
) -> None:
    """y += x ΔW_lᵀ by the transforms' kernels, with S's product in plain PyTorch; see the reference."""
    T = reference.Transforms(kind, signs, orders, _transforms)
    reference.add_by_adapter(T, y, x, values, by_row, ids, scaling, scale)


def spectral_linear_grads(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    scale: float,
    needs_dx: bool,
    needs_dvalues: bool,
) -> tuple[Tensor, Tensor]:
    """dx = dy ΔW and dvalues, see the reference."""
    M, N, K = x.shape[:-1].numel(), dy.shape[-1], x.shape[-1]
    if not M or not N or not K:
        return reference.spectral_linear_grads(
            dy, x, values, by_row, by_column, signs, orders, kind, scale, needs_dx, needs_dvalues
        )
    T = reference.Transforms(kind, signs, orders, _transforms)
    dx, dvalues = x.new_empty(0), torch.empty(0, dtype=torch.float32, device=x.device)
    with _device.on(x):
        S = _Entries(by_column, reference.length_of(kind, K))
        tile = spectral_tiles(M, S.length, S.count, max(N, K))
        g = rows_of(dy)
        g = _laid(T.of_y(g.float()) if kind in _TWO_SIDED else g, tile)
        if needs_dvalues:
            u, rows = _laid(_transformed_x(T, x), tile), _Entries(by_row, reference.length_of(kind, N))
            dvalues = _dots(g, u, M, rows, values.shape[0], T, scale)
        if needs_dx:
            fused = kind in ("identity", "haar")
            dx = torch.empty(x.shape, dtype=x.dtype if fused else torch.float32, device=x.device)
            _product(dx.view(M, K), None, g, S, values, T, scale, tile)
            if not fused:
                dx = T.of_x(dx, transpose=True).to(x.dtype)
    return dx, dvalues


def spectral_delta_weight(
    values: Tensor,
    by_row: Tensor,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    out_features: int,
    in_features: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """ΔW by the transforms' kernels, see the reference."""
    return delta_weight(values, by_row, signs, orders, kind, out_features, in_features, scale, dtype)


def spectral_weight_grad(
    dweight: Tensor,
    by_row: Tensor,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    count: int,
    scale: float,
) -> Tensor:
    """The values' gradient of ΔW's by the transforms' kernels, see the reference."""
    return weight_grad(dweight, by_row, signs, orders, kind, count, scale)


_TWO_SIDED = ("fourier", "dct", "hartley")  # whose T₂ is an op


class _Entries(NamedTuple):
    """``by_row`` or ``by_column``, and of how many rows it is."""

    table: Tensor
    length: int

    @property
    def count(self) -> int:
        return (self.table.shape[0] - self.length - 1) // 2


class _Laid(NamedTuple):
    """Rows of ``features`` numbers as kernels take them, with the strides of a block of rows, a row and a number."""

    tensor: Tensor
    features: int
    strides: tuple[int, int, int]


def _transformed_x(T: reference.Transforms, x: Tensor) -> Tensor:
    """The rows of T₁ x, or of x where kernels take them as they are."""
    x = rows_of(x)
    return x if T.kind in ("identity", "haar") else T.of_x(x.float())


def _laid(x: Tensor, tile: SpectralTiles) -> _Laid:
    """x, or a copy in blocks of rows, [blocks, features, block_m]."""
    rows, features = x.shape
    if not tile.blocked:
        return _Laid(x, features, (tile.block_m * x.stride(0), *x.stride()))
    blocks = triton.cdiv(rows, tile.block_m)
    out = torch.empty(blocks, features, tile.block_m, dtype=x.dtype, device=x.device)
    launch(
        block_kernel, (blocks, triton.cdiv(features, 64)),
        out, x, rows, features, *x.stride(), BLOCK_M=tile.block_m, BLOCK_K=64, num_warps=4, num_stages=1,
    )  # fmt: skip
    return _Laid(out, features, (features * tile.block_m, 1, tile.block_m))


def _factor(T: reference.Transforms, N: int, K: int, scale: float) -> float:
    """s, with the factors that kernels leave out of a Haar level of x and one of y."""
    return scale * reference.factor_of(T.kind, N, K) * (0.5 if T.kind == "haar" else 1.0)


def _product(
    out: Tensor,
    y: Tensor | None,
    x: _Laid,
    S: _Entries,
    values: Tensor,
    T: reference.Transforms,
    scale: float,
    tile: SpectralTiles,
) -> None:
    """out ← (y or 0) + s x Sᵀ, with the Haar transforms of both where those are asked for."""
    rows, columns = out.shape
    haar = T.kind == "haar"
    height = S.length // 2 if haar else S.length
    launch(
        product_kernel, (triton.cdiv(height, tile.block_r) * triton.cdiv(rows, tile.block_m),),
        out, y, x.tensor, S.table, values.contiguous(), rows, columns, S.length, S.count, x.features,
        _factor(T, columns, x.features, scale), *x.strides, *((0, 0) if y is None else y.stride()),
        BLOCK_M=tile.block_m, BLOCK_R=tile.block_r, BLOCK_E=tile.block_e, HAAR=haar, BLOCKED=tile.blocked,
        num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip


def _dots(g: _Laid, x: _Laid, rows: int, S: _Entries, count: int, T: reference.Transforms, scale: float) -> Tensor:
    """The gradients of ``count`` values: each entry's sum over chunks of rows, then over chunks, then its value's."""
    dvalues = torch.zeros(count, dtype=torch.float32, device=g.tensor.device)
    if not S.count:
        return dvalues
    tile = spectral_dot_tiles(rows, S.count, max(g.features, x.features), _device.gpu(g.tensor.device))
    parts = torch.empty(tile.chunks, S.count, dtype=torch.float32, device=g.tensor.device)
    launch(
        dot_kernel, (triton.cdiv(S.count, tile.block_e), tile.chunks),
        parts, g.tensor, x.tensor, S.table, rows, S.length, S.count, S.length.bit_length(), tile.steps,
        g.features, x.features, *g.strides, *x.strides,
        BLOCK_M=tile.block_m, BLOCK_E=tile.block_e, HAAR=T.kind == "haar", BLOCKED=tile.blocked,
        num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip
    launch(
        fold_kernel, (triton.cdiv(S.count, 64),),
        dvalues, parts, S.table, S.length, S.count, tile.chunks, _factor(T, g.features, x.features, scale),
        BLOCK_C=16, BLOCK_E=64, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dvalues
