"""Packed weights: :class:`QuantizedWeight`, the formats it reads and writes, and quantisers."""

from .quantisers import quantize
from .weight import QuantizedWeight

__all__ = ["QuantizedWeight", "quantize"]
