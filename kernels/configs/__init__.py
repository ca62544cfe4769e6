"""What of a GPU decides how kernels run, and tuned settings among it, one JSON file a device.

A file holds fields of ``lora_kernels.select.Gpu`` and is written by ``benchmarks/tune.py``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from lora_kernels.select import Gpu

HERE = Path(__file__).resolve().parent


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """What of ``device`` decides tiles; the CPU's is that of the interpreter and the host executor."""
    if device.type == "cpu":
        return Gpu((8, 0), 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    capability = (0, 0) if torch.version.hip else (properties.major, properties.minor)
    return Gpu(capability, shared, **settings(properties.name))


def settings(device: str, folder: Path = HERE) -> dict[str, Any]:
    """The settings of a device by its full name, such as ``NVIDIA H100 80GB HBM3``; none where it was not tuned."""
    file = folder / f"{slug(device)}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def slug(device: str) -> str:
    """A device's name as a file's."""
    return "-".join(device.lower().split())
