"""``quantized`` in Triton: the ops of ``lora_kernels.ops._quantized`` with the same arguments, for GPU tensors.

A product with a packed weight is one kernel, with one adapter's part in its sum; two where few rows leave the sum to
several programs. Many adapters' parts are added to the product in fp32 by ``low_rank``'s kernel, and the sum is rounded
by a third.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
from lora_kernels.reference import quantized as reference
from lora_kernels.reference.low_rank import num_adapters, rows_of
from lora_kernels.select import dequantize_tiles, quantized_grad_tiles, quantized_tiles

from . import _device
from ._repeat import launch, repeatable
from .grouped import planned, sum_into
from .low_rank import _expand_, _factors
from .quantized_kernels import dequantize_kernel, linear_grad_kernel, linear_kernel


@repeatable
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
    """out ← W[row : row + R, column : column + C] in one kernel, with the reference's bits."""
    if not out.numel():
        return
    (rows, columns), stop = out.shape, column + out.shape[1]
    codes, scales, offsets, table = map(_packed, (codes, scales, offsets, table))
    tile = dequantize_tiles(stop, group)
    with _device.on(out):
        launch(
            dequantize_kernel,
            (triton.cdiv(rows, tile.block_m), triton.cdiv(stop, tile.block_k) - column // tile.block_k),
            out, codes, scales, offsets, table, row, column, rows, columns, codes.shape[0], stop,
            group, scales.shape[1], codes.stride(0), *out.stride(),
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, ONE_GROUP=tile.one_group, EVEN=stop % tile.block_k == 0,
            num_warps=tile.num_warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


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
    """y = x Wᵀ + bias + s v Bᵀ, see the reference."""
    rows, N, K = x.shape[:-1].numel(), codes.shape[0], x.shape[-1]
    if not rows or not N or not K:
        return reference.quantized_linear(
            x, codes, scales, offsets, table, group, bias, v, B, ids, indptr, plan, scaling, ranks, weights, scale
        )
    codes, scales, offsets, table, bias = map(_packed, (codes, scales, offsets, table, bias))
    routed = [t for t in (ids, indptr, plan, scaling, ranks, weights) if t is not None]
    fused = v is not None and not routed and len(B) == 1 and num_adapters(B) == 1
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    with _device.on(x):
        tile = quantized_tiles(rows, N, K, group, x.dtype, (B[0] if fused else x).dtype, _device.gpu(x.device))
        direct = tile.split == 1 and (v is None or fused or x.dtype == torch.float32)
        parts = y.view(1, rows, N)
        if not direct:
            parts = torch.empty(tile.split, rows, N, dtype=torch.float32, device=x.device)
        source, v_rows, factor = rows_of(x), None, None
        if fused:
            v_rows, factor = v[0].contiguous(), B[0] if B[0].dim() == 2 else B[0][0]
        launch(
            linear_kernel, (triton.cdiv(N, tile.block_n), triton.cdiv(rows, tile.block_m), tile.split),
            parts, source, codes, scales, offsets, table, bias, v_rows, factor, rows, N, K,
            0 if v is None else v.shape[-1], group, scales.shape[1], tile.steps, scale,
            *source.stride(), codes.stride(0), *((0, 0) if factor is None else factor.stride()),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
            ONE_GROUP=tile.one_group, EVEN=K % tile.block_k == 0, PRECISION=_device.precision(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if v is not None and not fused:
            factors = _factors(B, -1)
            plan = planned(v.shape[1], factors.adapters, ids, indptr, plan, x)
            _expand_(parts[0], v.contiguous()[None], factors, plan, scaling, ranks, weights, scale)
        if not direct:
            sum_into(y.view(rows, N), parts)
    return y


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
    """dx = dy W + s v A, see the reference."""
    rows, N, K = dy.shape[:-1].numel(), codes.shape[0], in_features
    if not rows or not N or not K:
        return reference.quantized_linear_grad(dy, codes, scales, offsets, table, group, K, v, A, scale)
    codes, scales, offsets, table = map(_packed, (codes, scales, offsets, table))
    if v is None or A is None:
        v = A = None
    dx = torch.empty(*dy.shape[:-1], K, dtype=dy.dtype, device=dy.device)
    with _device.on(dy):
        tile = quantized_grad_tiles(rows, N, K, group, dy.dtype, (dy if A is None else A).dtype, _device.gpu(dy.device))
        parts = dx.view(1, rows, K)
        if tile.split > 1:
            parts = torch.empty(tile.split, rows, K, dtype=torch.float32, device=dy.device)
        source = rows_of(dy)
        launch(
            linear_grad_kernel, (triton.cdiv(K, tile.block_k), triton.cdiv(rows, tile.block_m), tile.split),
            parts, source, codes, scales, offsets, table, _packed(v), A, rows, N, K, 0 if A is None else A.shape[0],
            group, scales.shape[1], tile.steps, scale,
            *source.stride(), codes.stride(0), *((0, 0) if A is None else A.stride()),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
            ONE_GROUP=tile.one_group, EVEN=K % tile.block_k == 0, PRECISION=_device.precision(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if tile.split > 1:
            sum_into(dx.view(rows, K), parts)
    return dx


def _packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
