"""What kernels ask of the GPU they are launched on; nothing else in this folder asks torch."""

from __future__ import annotations

import contextlib

import torch
from lora_kernels.kernels.configs import gpu
from torch import Tensor


def precision() -> str:
    """How Triton multiplies fp32: three tf32 products on NVIDIA, exactly on AMD."""
    return "ieee" if torch.version.hip else "tf32x3"


def overlap(device: torch.device, wanted: bool) -> dict[str, bool]:
    """Whether a kernel may start while the one before it ends, and waits inside: Hopper and later."""
    if wanted and gpu(device).capability >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's GPU."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
