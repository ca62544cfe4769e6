"""``lora_linear`` in Triton: the ops of ``lora_kernels.ops._lora_linear`` with the same arguments, for GPU tensors.

Beside the base layer's products a training step takes a shrink and an expand, and four or five kernels backward: dy is
read once for dv and dB where the rank is small, x and dx once for dA and dx, and what each leaves in parts is added up
by one kernel.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

import triton
from lora_kernels.reference import lora_linear as reference
from lora_kernels.reference.dropout import threshold as threshold_of
from lora_kernels.reference.low_rank import rows_of
from lora_kernels.select import Gpu, expand_grad_tiles, gradient_rows, in_grad_tiles, outer_tiles

from . import _device
from ._repeat import launch
from .lora_linear_kernels import add_up_kernel, dropout_kernel, in_grad_kernel
from .low_rank import (
    NO_GRAD_COLUMNS,
    Columns,
    GradColumns,
    _expand_,
    _expand_grad_parts,
    _factors,
    _outer_parts,
    _parts,
    _shrink,
    lora_shrink,
    steps,
)


def lora_down(x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """v = x̃ Aᵀ, in one kernel and, where that leaves parts, one that adds them up."""
    if not x.numel():
        return reference.lora_down(x, A, seed, p)
    with _device.on(x):
        a, threshold = _factors([A[None]], -2), threshold_of(p)
        planes = _shrink(x, a, None, None, x.shape[:-1].numel(), whole=False, seed=seed, threshold=threshold)[:, 0]
        if planes.shape[0] == 1:
            return planes[0]
        v = torch.empty_like(planes[0])
        _add_up([Sum(v, planes, 1.0)])
    return v


def lora_forward_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    column_scale: Tensor | None,
    other: Tensor | None,
    other_scale: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> Tensor:
    """y ← c∘y + e∘other + s (x̃ Aᵀ) Bᵀ + b in two kernels; returns v = x̃ Aᵀ, which the second adds up from its parts."""
    if not x.numel() or not y.numel():
        return reference.lora_forward_(y, x, A, B, column_scale, other, other_scale, bias, seed, p, scale)
    rows = x.shape[:-1].numel()
    beside = None if other is None else rows_of(other)
    columns = Columns(_packed(column_scale), beside, _packed(other_scale), _packed(bias))
    with _device.on(x):
        a, b, threshold = _factors([A[None]], -2), _factors([B[None]], -1), threshold_of(p)
        parts = _shrink(x, a, None, None, rows, whole=False, seed=seed, threshold=threshold)
        v = parts[0, 0]
        if parts.shape[0] > 1:
            v = torch.empty_like(v)
            columns = columns._replace(v_sum=v)
        _expand_(y, parts, b, None, None, None, None, scale, columns=columns, overlap=True)
    return v


def lora_out_grads(
    dy: Tensor,
    v: Tensor,
    B: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor | None,
    scale: float,
    need_v: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dv, dB, dz, t), see the reference: in two kernels of small ranks, three of others."""
    if not dy.numel():
        return reference.lora_out_grads(dy, v, B, y, bias, column_scale, scale, need_v, need_B)
    (rows, R), N = v.shape, B.shape[0]
    none, v, grad = v.new_empty(0), v.contiguous(), rows_of(dy)
    dv, dB, t = (
        v.new_empty(size) if needed else none.clone()
        for size, needed in (((rows, R), need_v), ((N, R), need_B), (N, y is not None))
    )
    dz = dy.new_empty(0 if column_scale is None else dy.shape)
    by_column = y is not None or column_scale is not None
    sums = []
    with _device.on(dy):
        gpu = _device.gpu(dy.device)
        tile = expand_grad_tiles(R, dy.dtype, B.dtype, gpu, by_column)
        fused = tile.fused and (by_column or (need_v and need_B))
        if fused or by_column:
            columns = NO_GRAD_COLUMNS
            if by_column:
                beside = None if y is None else rows_of(y)
                scaled = None if column_scale is None else dz
                columns = GradColumns(beside, _packed(bias), _packed(column_scale), scaled)
            parts = _expand_grad_parts(
                grad, v, _factors([B[None]], -1), None, None, None, B.dtype, False,
                size=gradient_rows(rows, triton.cdiv(N, tile.block_n), tile.size, gpu),
                need_v=need_v and fused, need_B=need_B and fused,
                columns=columns,
            )  # fmt: skip
            sums = [Sum(*one) for one in zip((dv, dB, t), parts, (1.0, scale, 1.0), strict=True) if one[1] is not None]
        if need_v and not fused:
            planes = _shrink(grad, _factors([B.mT[None]], -2), None, None, rows, whole=False)[:, 0]
            if planes.shape[0] == 1:
                dv = planes[0]
            else:
                sums.append(Sum(dv, planes, 1.0))
        if need_B and not fused:
            sums.append(Sum(dB, _outer_alone(grad, v, B.dtype, gpu), scale))
        _add_up(sums)
    return dv, dB, dz, t


def lora_in_grads_(
    dx: Tensor,
    dv: Tensor,
    x: Tensor | None,
    A: Tensor,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> Tensor:
    """dx ← dx + s mask∘(dv A), and dA = s dvᵀ x̃, in two kernels."""
    (rows, R), K = dv.shape, A.shape[1]
    of = dx if x is None else x
    if not of.numel():
        return reference.lora_in_grads_(dx, dv, x, A, seed, p, scale)
    out = rows_of(dx) if dx.numel() else None
    source = None if x is None else rows_of(x)
    dv = dv.contiguous()
    dA = dv.new_empty(0 if x is None else A.shape)
    with _device.on(of):
        tile = in_grad_tiles(rows, K, R, of.dtype, A.dtype, _device.gpu(of.device))
        blocks = triton.cdiv(R, tile.block_r)
        grid = (triton.cdiv(rows, tile.size), triton.cdiv(K, tile.block_k), blocks)
        parts = None if x is None else dv.new_empty(grid[0], R, K)
        launch(
            in_grad_kernel, grid,
            out, parts, dv, source, A, seed, rows, K, R, scale, threshold_of(p),
            *steps(out), *steps(source), *A.stride(),
            SIZE=tile.size, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
            ONE_BLOCK_OF_RANKS=blocks == 1, PARTS=_parts(A.dtype), PRECISION=_device.precision(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if parts is not None:
            _add_up([Sum(dA, parts, scale)])
        if out is not None and out.data_ptr() != dx.data_ptr():
            dx.copy_(out.view(dx.shape))
    return dA


def lora_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x̃ = mask∘x, not scaled, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = rows_of(x)
    if rows.numel():
        (M, K), block_m, block_k = rows.shape, 8, 512
        with _device.on(x):
            launch(
                dropout_kernel, (triton.cdiv(M, block_m), triton.cdiv(K, block_k)),
                out, rows, seed, M, K, threshold_of(p), *rows.stride(),
                BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4, num_stages=1,
            )  # fmt: skip
    return out


class Sum(NamedTuple):
    """out = scale · (parts[0] + parts[1] + ...), all fp32 and contiguous."""

    out: Tensor
    parts: Tensor
    scale: float


def _add_up(sums: list[Sum]) -> None:
    """One to three sums in one kernel; of none, nothing."""
    if sums:
        args = [(s.out, s.parts, s.out.numel(), s.parts.shape[0], s.scale) for s in sums]
        launch(
            add_up_kernel, (sum(triton.cdiv(s.out.numel(), 1024) for s in sums),),
            *itertools.chain(*args, *[(None, None, 0, 0, 0.0)] * (3 - len(sums))),
            BLOCK=1024, num_warps=4, num_stages=1,
        )  # fmt: skip


def _outer_alone(u: Tensor, w: Tensor, dtype: torch.dtype, gpu: Gpu) -> Tensor:
    """The parts ``[tiles, U, W]`` of uᵀ w."""
    (rows, U), W = u.shape, w.shape[1]
    tile = outer_tiles(U)
    size = gradient_rows(rows, triton.cdiv(U, tile.block_u) * triton.cdiv(W, tile.block_w), tile.size, gpu)
    return _outer_parts(u[None], w, 1, None, None, rows, dtype, size)[:, 0]


def _packed(columns: Tensor | None) -> Tensor | None:
    return None if columns is None else columns.contiguous()


def lora_weight_norm(weight: Tensor, A: Tensor, B: Tensor, weight_norm_sq: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row, see the reference: the weight is read once, by the shrink, as it is."""
    if weight.stride(-1) != 1:
        return reference.lora_weight_norm(weight, A, B, weight_norm_sq, scale)
    products = lora_shrink(weight, [A], None, None, None, None, weight.shape[0])[0]
    return reference.norm_of_products(products, weight, A, B, weight_norm_sq, scale)
