"""The registered ops of ``transforms``: schemas, fakes, FLOPs, what the CUDA kernels refuse."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import transforms as reference
from ._dispatch import Op, gpu, one_device

LARGEST_BASE = 1024  # that the CUDA kernel takes: its outputs are held by one block


def _flops_of_hadamard(x, signs, orders, scale, transpose, *, out_val=None):
    """K - 1 additions an element for a base of order K, one for each factor of two, one product."""
    power = x.shape[-1] // math.prod(orders)
    return x.numel() * (sum(orders) - len(orders) + int(math.log2(power)) + 1)


def _fake_hadamard(x, signs, orders, scale, transpose):
    one_device(x, signs)
    return x.new_empty(x.shape)


def _hadamard_refusal(x, signs, orders, scale, transpose) -> str | None:
    """Why the CUDA kernel can't take a call: it holds a row in a block's shared memory, in pairs of numbers."""
    N = x.shape[-1]
    if x.dtype == torch.float64:
        return "float64"
    power = N // math.prod(orders)
    if any(order > 2 and order & (order - 1) == 0 for order in orders):
        return "base whose order is a power of two"
    if power % 2:
        return f"row of {N} numbers, an odd multiple of its bases' orders"
    if max(orders, default=1) > LARGEST_BASE:
        return f"base of order {max(orders)}, more than {LARGEST_BASE}"
    padding = 16 if power >= 32 else power // 2 if power >= 8 else N
    if gpu(x.device).shared < 4 * (N + N // padding):
        return f"row of {N} numbers, which outgrows a block's shared memory"
    return None


def compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The extension's kernel of the same name; the reference for fp64, which it has not."""
    name = reference.__name__

    @functools.wraps(reference)
    def cpu(x: Tensor, *rest: Any) -> Any:
        if x.dtype == torch.float64:
            return reference(x, *rest)
        return getattr(torch.ops.lora_kernels_C, name)(x, *rest)

    return cpu


def _fake(x, *rest):
    return x.new_empty(x.shape)


def _flops_of_trigonometric(x, form, first, rest, transpose, *, out_val=None):
    """A real fast Fourier transform's, as they are counted for a power of two."""
    return int(2.5 * x.numel() * math.log2(max(x.shape[-1], 2)))


hadamard = Op(
    reference.hadamard,
    fake=_fake_hadamard,
    cpu=compiled(reference.hadamard),
    flops=_flops_of_hadamard,
    cuda_refuses=_hadamard_refusal,
)
trigonometric = Op(
    reference.trigonometric, fake=_fake, cpu=compiled(reference.trigonometric), flops=_flops_of_trigonometric
)
haar = Op(
    reference.haar,
    fake=_fake,
    cpu=compiled(reference.haar),
    flops=lambda x, levels, transpose, *, out_val=None: 2 * x.numel() * min(levels, 2),
)
