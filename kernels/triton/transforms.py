"""``transforms`` in Triton: the ops of ``lora_kernels.ops._transforms`` with the same arguments, for GPU tensors.

One kernel a transform; two where a Hadamard matrix has factors that are large together, or a row twelve levels or more.
The matrices that rows are multiplied with are made once for a length and a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import triton
from lora_kernels.reference.hadamard import _kept, base
from lora_kernels.reference.low_rank import rows_of
from lora_kernels.select import haar_tiles, hadamard_stages, hadamard_tiles, trigonometric_tiles

from . import _device
from ._repeat import launch
from .transforms_kernels import (
    haar_kernel,
    haar_transpose_kernel,
    hadamard_kernel,
    trigonometric_kernel,
    trigonometric_transpose_kernel,
)


def hadamard(x: Tensor, signs: Tensor | None, orders: Sequence[int], scale: float, transpose: bool) -> Tensor:
    """y = scale · H x, see the reference; a stage multiplies with some of the factors of H."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    source, inner = rows_of(x), x.shape[-1]
    rows, (x_m, x_n) = source.shape[0], source.stride()
    stages = hadamard_stages(tuple(orders), inner // math.prod(orders))
    with _device.on(x):
        for stage in stages:
            last = stage is stages[-1]
            out = y if last else torch.empty(x.shape, dtype=torch.float32, device=x.device)
            L = math.prod(stage.orders) * stage.power
            inner //= L
            tile = hadamard_tiles(L, inner, stage.right, source.dtype, out.dtype, _device.gpu(x.device))
            blocks = [triton.cdiv(*n) for n in ((rows, tile.block_m), (L, tile.block_i), (inner, tile.block_q))]
            left = _left(stage.orders, stage.power, transpose, x.device)
            launch(
                hadamard_kernel, tuple(blocks),
                out, source, left, _right(stage.right, x.device),
                rows, L, inner, left.stride(0), x_m, x_n, scale if last else 1.0,
                BLOCK_I=tile.block_i, BLOCK_J=tile.block_j, BLOCK_M=tile.block_m, BLOCK_Q=tile.block_q,
                PRECISION=_device.precision(), num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            source, rows, x_m, x_n = out, rows * L, inner, 1
    return y


def trigonometric(x: Tensor, form: str, first: float, rest: float, transpose: bool) -> Tensor:
    """y = D T x or (D T)ᵀ x, see the reference."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    source, N = rows_of(x), x.shape[-1]
    rows = source.shape[0]
    with _device.on(x):
        tile = trigonometric_tiles(N, x.dtype, transpose, _device.gpu(x.device))
        N1 = N // tile.N2
        # A product with fp32 numbers takes bf16's range.
        dtype = torch.bfloat16 if transpose and x.dtype == torch.float16 else x.dtype
        left = _left_angles(N1, tile.gather, dtype, x.device)
        twiddles = right = None
        if tile.N2 > 1:
            half = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
            twiddles, right = _twiddles(N1, tile.N2, x.device), _right_angles(tile.N2, tile.block_q, half, x.device)
        kernel, width, block = trigonometric_kernel, N1 // 2 + 1, tile.block_i
        if transpose:
            kernel, width, block = trigonometric_transpose_kernel, N1, tile.block_j
        launch(
            kernel, (triton.cdiv(rows, tile.block_m), triton.cdiv(width, block)),
            y, source, left, twiddles, right, _turns(form, N, x.device),
            rows, N, N1, tile.N2, left.stride(1), left.stride(2), _up(N1 // 2 + 1), first, rest, *source.stride(),
            BLOCK_M=tile.block_m, BLOCK_I=tile.block_i, BLOCK_J=tile.block_j, BLOCK_Q=tile.block_q,
            FOLDED=form == "cosine", GATHER=tile.gather, PRECISION=_device.precision(),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


def haar(x: Tensor, levels: int, transpose: bool) -> Tensor:
    """``levels`` levels of each row or their transpose, see the reference."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    source, out = rows_of(x), y.view(-1, x.shape[-1])
    lengths = [x.shape[-1]]
    for _ in range(levels):
        lengths.append((lengths[-1] + 1) // 2)
    rows, low, tiles = source.shape[0], source, haar_tiles(lengths[0], levels)
    with _device.on(x):
        for tile in reversed(tiles) if transpose else tiles:
            here = tuple(lengths[tile.level : tile.level + tile.levels + 1])
            result = out
            if tile is not tiles[0 if transpose else -1]:
                shape = out.shape[0], here[0 if transpose else -1]
                result = torch.empty(shape, dtype=torch.float32, device=x.device)
            args: tuple = (out, result, low, rows, here, *low.stride(), out.stride(0), result.stride(0))
            if transpose:
                args = (result, low, source, rows, here, *source.stride(), *low.stride())
            launch(
                haar_transpose_kernel if transpose else haar_kernel,
                (triton.cdiv(rows, tile.block_m), triton.cdiv(here[0], tile.block)), *args,
                BLOCK_M=tile.block_m, BLOCK=tile.block, num_warps=tile.num_warps, num_stages=1,
            )  # fmt: skip
            low = result
    return y


@_kept
def _left(orders: tuple[int, ...], power: int, transpose: bool, device: torch.device) -> Tensor:
    """H₁ ⊗ H₂ ⊗ ... ⊗ H_{power}, or its transpose, in bf16 and rows of a multiple of 16, the rest 0."""
    H = torch.ones(1, 1, dtype=torch.int8)
    for factor in [base(order) for order in orders] + [base(2)] * (power.bit_length() - 1):
        H = torch.kron(H, factor)
    return _widened((H.T if transpose else H).to(torch.bfloat16)).to(device)


def _right(order: int, device: torch.device) -> Tensor | None:
    return None if order == 1 else _left((), order, False, device)


@_kept
def _left_angles(N1: int, gather: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines of 2π k n / N1, [2, parts, N1 // 2 + 1, N1 and a rest]; gathered ones, for k = 1 only."""
    k = torch.arange(1, 2) if gather else torch.arange(N1 // 2 + 1)
    return _parts(_widened(_cosines_and_sines(k, torch.arange(N1), N1)), dtype).to(device)


@_kept
def _twiddles(N1: int, N2: int, device: torch.device) -> Tensor:
    """Cosines and sines of 2π n k / (N1 N2), [2, N2, N1 // 2 + 1 and a rest], in fp32."""
    return _widened(_cosines_and_sines(torch.arange(N2), torch.arange(N1 // 2 + 1), N1 * N2)).float().to(device)


@_kept
def _right_angles(N2: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines of 2π k n / N2, [2, parts, size, size], 0 past N2."""
    n = torch.arange(N2)
    angles = torch.zeros(2, size, size, dtype=torch.float64)
    angles[:, :N2, :N2] = _cosines_and_sines(n, n, N2)
    return _parts(angles, dtype).to(device)


def _cosines_and_sines(k: Tensor, n: Tensor, N: int) -> Tensor:
    """Of 2π k n / N, [2, k, n], in fp64; whole turns are left out, so that they are right to the last bit."""
    angle = (k[:, None] * n % N).double() * (2 * math.pi / N)
    return torch.stack((angle.cos(), angle.sin()))


def _parts(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, ...] in ``dtype``, as [2, 1, ...]; in 16 bits as [2, 2, ...]: rounded, and what that leaves, rounded."""
    parts = [t.to(dtype)]
    if dtype != torch.float32:
        parts.append((t - parts[0].double()).to(dtype))
    return torch.stack(parts, 1)


def _widened(t: Tensor) -> Tensor:
    """Rows of a multiple of 16 numbers, of which what is past the row is 0: their addresses are aligned."""
    return torch.nn.functional.pad(t, (0, _up(t.shape[-1]) - t.shape[-1])).contiguous()


def _up(n: int) -> int:
    return -(-n // 16) * 16


@_kept
def _turns(form: str, N: int, device: torch.device) -> Tensor:
    """a and b of y_k = a C_k + b S_k, [2, N]: C_k and S_k sum x_n cos(2π k n / N) and x_n sin(2π k n / N)."""
    k = torch.arange(N)
    if form == "hartley":
        turns = torch.ones(2, N)
    elif form == "fourier":
        turns = torch.stack((2 * k <= N, -(2 * k > N).long())).float()
    else:
        angle = k.double() * (math.pi / (2 * N))
        turns = torch.stack((angle.cos(), -angle.sin())).float()
    return turns.to(device)
