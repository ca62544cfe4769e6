"""Why a PEFT LoRA layer would run PEFT's own forward, in words: what :mod:`._peft_state` and :mod:`._peft_forward`
decide, said for a report."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor
from torch.nn import Dropout, Identity, Linear, Module, Parameter

from ..ops import _check
from ..ops._dispatch import Op, extension_error, forced_backend
from ..ops._low_rank import lora_add_
from ..select import choose
from ._peft_packed import kind_of, packed_reason
from ._peft_state import KASA, MICA, conv1d, unusual

DISABLED = "base layer only: adapters disabled"
MERGED = "base layer only: adapters merged"
INACTIVE = "base layer only: no active adapter here"
BASE_ONLY = frozenset({DISABLED, MERGED, INACTIVE})

#: PEFT's LoRA over quantised layers: what they add to the base layer's result is what ``Linear`` adds.
_QUANTISED = {
    "peft.tuners.lora.bnb": ("Linear8bitLt", "Linear4bit"),
    "peft.tuners.lora.hqq": ("HqqLoraLinear",),
    "peft.tuners.lora.gptq": ("GPTQLoraLinear",),
    "peft.tuners.lora.awq": ("AwqLoraLinear",),
}


def slow_reason(layer: Any, x: Tensor | None = None) -> str | None:
    """Why a LoRA layer would run PEFT's own forward now; None where it would run fast.

    Args:
        layer: any PEFT LoRA layer, patched or not.
        x: its input; without one, an input of the base weight's dtype and device.
    """
    if (reason := class_reason(type(layer))) is not None:
        return reason
    d = layer.__dict__
    if "forward" in d and not getattr(d.get("_old_forward", d["forward"]), "takes_names", False):
        return "the layer's forward was replaced on the instance"
    if d["_disable_adapters"]:
        return DISABLED
    if d["merged_adapters"]:
        return MERGED
    active = [n for n in layer.active_adapters if n in layer.lora_A]
    if not active:
        return INACTIVE
    factor = layer.lora_A[active[0]].weight
    weight = None if base_reason(layer) else layer.base_layer.weight
    of = (factor if weight is None else weight) if x is None else x
    dtype, device = of.dtype, of.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    for name in active:
        if (reason := _adapter_reason(layer, name, dtype)) is not None:
            return f"adapter {name!r}: {reason}"
    return _call_reason(layer, weight, x, dtype, device)


def base_reason(layer: Any) -> str | None:
    """Why the base layer runs by its own forward with the adapters' part beside it; None where it is one product."""
    base = layer.base_layer
    if type(base) is not Linear and not conv1d(base):
        return f"base layer is {_name(type(base))}, not torch.nn.Linear"
    if (reason := _module_reason("base layer", base)) is not None:
        return reason
    if base.weight.requires_grad and torch.is_grad_enabled():
        return "base weight requires grad"
    return None


def beside_reason(layer: Any) -> str | None:
    """:func:`base_reason` of a layer that runs fast, where a quantised base is in one product too."""
    base = layer.base_layer
    if kind_of(base) is None:
        return base_reason(layer)
    if "forward" in base.__dict__:
        return "base layer: its forward was replaced on the instance"
    return "base layer has hooks" if _altered(base.__dict__) else packed_reason(base)


def class_reason(cls: type) -> str | None:
    """Why a layer of this class can't have the fast forward; None where it can or does."""
    if any(_name(c) in _QUANTISED.get(c.__module__, ()) for c in cls.__mro__):
        return None
    if not issubclass(cls, PeftLinear):
        return f"{_name(cls)} is not PEFT's LoRA over torch.nn.Linear"
    if not getattr(cls.forward, "takes_names", False):  # type: ignore[attr-defined]
        for method in ("forward", "_mixed_batch_forward", "_check_forward_args", "_cast_input_dtype"):
            if getattr(cls, method) is not getattr(PeftLinear, method):
                return f"{_name(cls)} has its own {method}"
    return None


def _module_reason(what: str, module: Module) -> str | None:
    d, weight = module.__dict__, module._parameters.get("weight")
    if "forward" in d:
        return f"{what}: its forward was replaced on the instance"
    if _altered(d):
        return f"{what} has hooks"
    if type(weight) is not Parameter:
        return f"{what}: its weight is {'not a parameter' if weight is None else _name(type(weight))}"
    if weight.dim() != 2 or not weight.numel():
        return f"{what}: its weight is {list(weight.shape)} here (a shard, or not gathered)"
    return None


def _adapter_reason(layer: Any, name: str, dtype: torch.dtype) -> str | None:
    variant = layer.lora_variant.get(name)
    if variant is not None and (reason := _variant_reason(layer, name, variant)) is not None:
        return reason
    a, b, dropout, scale = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
    if type(dropout) not in (Identity, Dropout):
        return f"dropout is {_name(type(dropout))}"
    if _altered(dropout.__dict__):
        return "dropout has hooks"
    for what, module in (("lora_A", a), ("lora_B", b)):
        if type(module) is not Linear:
            return f"{what} is {_name(type(module))}, not torch.nn.Linear"
        if (reason := _module_reason(what, module)) is not None:
            return reason
        if module is a and a.bias is not None:
            return "lora_A has a bias"
        if module.weight.dtype not in (dtype, torch.float32):
            return f"{what} is {_short(module.weight.dtype)}, the input {_short(dtype)}"
    if a.weight.dtype is not b.weight.dtype:
        return f"lora_A is {_short(a.weight.dtype)}, lora_B {_short(b.weight.dtype)}"
    if type(scale) not in (float, int):
        return f"scaling is a {_name(type(scale))}"
    return None


def _variant_reason(layer: Any, name: str, variant: Any) -> str | None:
    kind = _name(type(variant)).removesuffix("LinearVariant")
    if MICA is not None and type(variant) is MICA:
        return None
    if KASA is not None and type(variant) is KASA:
        if name in layer._lora_kasa_truncation_deferred:
            return "KaSA's truncation of the base weight is still to come"
        core = layer.lora_diag[name]
        return None if type(core) is Parameter else f"lora_diag is {_name(type(core))}"
    if type(variant) is not DoraLinearVariant:
        return f"{kind} variant"
    if len(layer.active_adapters) > 1:
        return "DoRA beside other active adapters"
    if (reason := base_reason(layer)) is not None:
        return f"DoRA needs a plain base: {reason}"
    vector = layer.lora_magnitude_vector[name]
    if type(vector) is not DoraLinearLayer:
        return f"lora_magnitude_vector is {_name(type(vector))}"
    if _altered(vector.__dict__):
        return "lora_magnitude_vector has hooks"
    if type(vector.weight) is not Parameter:
        return f"lora_magnitude_vector: its weight is {_name(type(vector.weight))}"
    return None


def _altered(d: dict) -> Any:
    """Whether calling the module whose ``__dict__`` this is does more than its class's forward."""
    return (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


def _call_reason(
    layer: Any, weight: Tensor | None, x: Tensor | None, dtype: torch.dtype, device: torch.device
) -> str | None:
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if dtype not in _check.FLOATS or not (autocast or weight is None or weight.dtype is dtype):
        return f"input is {_short(dtype)}, base weight {_short(weight.dtype)}"  # type: ignore[union-attr]
    if len({layer.lora_A[n].weight.dtype for n in layer.active_adapters if n in layer.lora_A}) > 1:
        return "active adapters of different dtypes"
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is disabled"
    if unusual():
        return "global module hooks or forward-mode differentiation"
    if x is not None and type(x) is not Tensor:
        return f"input is {_name(type(x))}"
    return _backend_reason(device.type)


def _backend_reason(device: str, op: Op = lora_add_) -> str | None:
    choice = choose(device, op.backends(), forced_backend())
    if choice.backend == "reference" and forced_backend() is None:
        return choice.reason if device != "cpu" else f"{choice.reason} ({extension_error})"
    return None


def _name(cls: type) -> str:
    return cls.__qualname__


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
