"""Fast kernels for LoRA-family adapters: one adapter or hundreds in one batch, forward and backward.

    import lora_kernels as lk

    lk.patch(peft_model)                                   # the same PEFT model, faster
    lk.bgmv(y, x, A, B, adapter_ids)                       # many adapters over the rows of one batch, in place
    lk.multi_lora(x, A, B, adapter_ids)                    # the same, differentiable
    lk.lora_linear(x, weight, A, B, scaling=2.0)           # a frozen linear layer with one adapter
    qw = lk.quantize(weight, "nf4")                        # or QuantizedWeight.from_bitsandbytes(param), ...
    lk.quantized_lora_linear(x, qw, A, B, scaling=2.0)     # a 4-bit base with its adapter in the same sum
    lk.wht(x), lk.dct(x), lk.dht(x), lk.haar(x)            # transforms of each row, of any length
    lk.spectral_linear(x, values, plan, kind="fourier")    # an adapter that is a sparse spectrum, without its weight

Names are imported when first used; importing the package has no side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

_HOME = {
    "ops.low_rank": ("bgmv", "sgmv", "bgmv_shrink", "bgmv_expand", "sgmv_shrink", "sgmv_expand", "multi_lora"),
    "ops.lora_linear": ("lora_linear",),
    "ops.quantized": ("dequantize", "quantized_linear", "quantized_lora_linear", "quantized_multi_lora_linear"),
    "quantization": ("QuantizedWeight", "quantize"),
    "quantization.merge": ("merge_requant",),
    "ops.transforms": ("wht", "dct", "idct", "dht", "haar", "ihaar"),
    "ops.spectral": ("spectral_linear", "spectral_delta_weight", "spectral_location_grad", "bgmv_spectral"),
    "ops.projection": ("dct_topk_project", "dct_backproject"),
    "ops.structured": ("householder_linear", "block_rotate"),
    "spectral_plan": ("SpectralPlan",),
    "ops._dispatch": ("backend",),
    "plan": ("BatchPlan",),
    "integrations.peft": ("patch",),
    "_info": ("info",),
}  # fmt: skip
_MODULES = ("nn", "init", "reference", "testing", "demo")
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", "nn", "init", *_WHERE]

if TYPE_CHECKING:
    from . import init, nn
    from ._info import info
    from .integrations.peft import patch
    from .ops._dispatch import backend
    from .ops.lora_linear import lora_linear
    from .ops.low_rank import (
        bgmv,
        bgmv_expand,
        bgmv_shrink,
        multi_lora,
        sgmv,
        sgmv_expand,
        sgmv_shrink,
    )
    from .ops.projection import dct_backproject, dct_topk_project
    from .ops.quantized import dequantize, quantized_linear, quantized_lora_linear, quantized_multi_lora_linear
    from .ops.spectral import bgmv_spectral, spectral_delta_weight, spectral_linear, spectral_location_grad
    from .ops.structured import block_rotate, householder_linear
    from .ops.transforms import dct, dht, haar, idct, ihaar, wht
    from .plan import BatchPlan
    from .quantization import QuantizedWeight, quantize
    from .quantization.merge import merge_requant
    from .spectral_plan import SpectralPlan


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
