"""Tuned settings, one JSON file a device: fields of ``lora_kernels.select.Gpu``, written by ``benchmarks/tune.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def settings(device: str, folder: Path = HERE) -> dict[str, Any]:
    """The settings of a device by its full name, such as ``NVIDIA H100 80GB HBM3``; none where it was not tuned."""
    file = folder / f"{slug(device)}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def slug(device: str) -> str:
    """A device's name as a file's."""
    return "-".join(device.lower().split())
