"""Thin modules over the ops, for models built without an adapter library."""

from .low_rank import DoRALinear, LoRALinear, MultiLoRALinear
from .quantized import QuantizedLoRALinear

__all__ = ["DoRALinear", "LoRALinear", "MultiLoRALinear", "QuantizedLoRALinear"]
