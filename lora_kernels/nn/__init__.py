"""Thin modules over the ops, for models built without an adapter library."""

from .loca import LoCALinear, LoCASchedule
from .low_rank import DoRALinear, LoRALinear, MultiLoRALinear
from .quantized import QuantizedLinear, QuantizedLoRALinear
from .qwha import QWHALinear
from .spectral import FourierFTLinear, WaveFTLinear

__all__ = [
    "DoRALinear",
    "FourierFTLinear",
    "LoCALinear",
    "LoCASchedule",
    "LoRALinear",
    "MultiLoRALinear",
    "QWHALinear",
    "QuantizedLinear",
    "QuantizedLoRALinear",
    "WaveFTLinear",
]
