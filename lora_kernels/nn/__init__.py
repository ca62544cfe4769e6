"""Thin modules over the ops, for models built without an adapter library."""

from .low_rank import LoRALinear, MultiLoRALinear

__all__ = ["LoRALinear", "MultiLoRALinear"]
