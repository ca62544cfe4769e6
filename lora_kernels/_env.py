"""Every environment variable the package reads, in one place (the README has the same table)."""

from __future__ import annotations

import os
from pathlib import Path


def backend() -> str | None:
    """``LORA_KERNELS_BACKEND``: force one backend for every op; a name in ``select.BACKENDS``."""
    return os.environ.get("LORA_KERNELS_BACKEND") or None


def isa() -> str | None:
    """``LORA_KERNELS_ISA``: the CPU instruction set to use, such as ``avx2``, instead of the best one here."""
    return os.environ.get("LORA_KERNELS_ISA") or None


def check() -> bool:
    """``LORA_KERNELS_CHECK=1``: also check what costs a device synchronisation, such as ids on a GPU."""
    return os.environ.get("LORA_KERNELS_CHECK", "0") not in ("", "0")


def vllm() -> bool:
    """``LORA_KERNELS_VLLM=0``: leave vLLM's own LoRA kernels in place."""
    return os.environ.get("LORA_KERNELS_VLLM", "1") not in ("", "0")


def interpreted() -> bool:
    """``TRITON_INTERPRET=1``, Triton's own: its kernels run in Python, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def cache_dir() -> Path:
    """``LORA_KERNELS_CACHE``: where the demo keeps its model and adapters (``~/.cache/lora_kernels``)."""
    return Path(os.environ.get("LORA_KERNELS_CACHE") or Path.home() / ".cache" / "lora_kernels")
