"""The forward of a patched PEFT LoRA layer: y = x Wᵀ + b + Σᵢ sᵢ (x Aᵢᵀ) Bᵢᵀ, or PEFT's own where that must run.

A call is taken by reading the layer's state as it is now, in dictionary lookups, since the whole of it must cost a few
microseconds: nothing derived from the layer is kept between calls. Whatever could change the result in silence (hooks,
dropout, a variant, autocast, another class of module or parameter) is looked at; what the kernels refuse before they
write anything (shapes, dtypes, devices) is left to them, and the call then goes to PEFT. :func:`slow_reason` says the
same in words.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from torch.nn.functional import linear
from torch.nn.modules import module as _globals

from ..ops import _check
from ..ops._dispatch import extension_error, forced_backend
from ..ops.low_rank import _call, _LoRALinear, _multi_lora, lora_add_
from ..select import choose
from ._peft_batch import NAMES, Names, scaling_tensor

logger = logging.getLogger("lora_kernels")

DISABLED = "base layer only: adapters disabled"
MERGED = "base layer only: adapters merged"
INACTIVE = "base layer only: no active adapter here"
BASE_ONLY = frozenset({DISABLED, MERGED, INACTIVE})

_autocast = torch._C._is_any_autocast_enabled
_forward_pre_hooks, _forward_hooks = _globals._global_forward_pre_hooks, _globals._global_forward_hooks
_backward_pre_hooks, _backward_hooks = _globals._global_backward_pre_hooks, _globals._global_backward_hooks
_compiled = extension_error is None
_add = lora_add_.overload


class FusedMixin:
    """PEFT's LoRA ``Linear`` with a fast forward. Only a class: no state of its own, nothing in the state dict."""

    def forward(self, x: Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Tensor:
        """PEFT's ``forward``: the same results, errors and dtype."""
        if adapter_names is None:
            adapter_names = self.__dict__.get(NAMES)
        refusal = None
        if not (args or kwargs):
            try:
                y = _forward(self, x, adapter_names)
                if y is not None:
                    return y
            except (RuntimeError, TypeError, ValueError, KeyError) as error:
                if _forced_in_vain(x):
                    raise
                refusal = f"{type(error).__name__}: {error}"
        y = super().forward(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[misc]
        if refusal is not None and slow_reason(self, x) is None:
            _warn_once(refusal)
        return y

    forward.takes_names = True  # type: ignore[attr-defined]


class FusedLinear(FusedMixin, PeftLinear):
    """What a plain ``peft.tuners.lora.Linear`` becomes."""


@functools.lru_cache(maxsize=64)
def _warn_once(refusal: str) -> None:
    logger.warning("a patched layer ran PEFT's own forward, which took what the kernels refused: %s", refusal)


def _forced_in_vain(x: Any) -> bool:
    forced = forced_backend()
    return forced is not None and choose(x.device.type, lora_add_.backends(), forced).backend is None


def _forward(layer: Any, x: Tensor, names: Any) -> Tensor | None:
    """The layer's output, or None where PEFT's own forward must run."""
    d = layer.__dict__
    if (
        type(x) is not Tensor
        or x.dtype is torch.float64
        or d["_disable_adapters"]
        or d["merged_adapters"]
        or not d["cast_input_dtype_enabled"]
        or _unusual()
    ):
        return None
    compiling = is_compiling()
    forced = None if compiling else forced_backend()
    if forced is None and not (_compiled and x.is_cpu):
        return None

    modules = d["_modules"]
    base = modules["base_layer"]
    if type(base) is not Linear or _altered(base.__dict__):
        return None
    parameters = base._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    if type(weight) is not Parameter:
        return None

    grad = torch.is_grad_enabled()
    if names is None:
        table, active = None, d["_active_adapter"]
        factors = _active(d, modules, (active,) if type(active) is str else active, grad)
    elif compiling:
        return None
    else:
        table, factors = _mixed(d, modules, x, names, grad)
    if factors is None:
        return None
    A, B, scales = factors
    grad = grad and _any_requires_grad(x, weight, bias, *A, *B)
    if grad and weight.requires_grad:
        return None

    scale, scaling = scales[0], None
    if table is None:
        if len(A) > 1:
            A, B, scale = _concatenated(A, B, scales)
        if grad:
            return _LoRALinear.apply(x, weight, bias, scale, A[0], B[0])
    elif scales.count(scale) != len(scales):
        scale, scaling = 1.0, scaling_tensor(tuple(scales), x.device)
    y = linear(x, weight, bias)
    if grad:
        return _multi_lora(x, A, B, None, table, scaling, None, None, y, scale)
    if forced is None:
        _add(y, x, A, B, None, None, table, scaling, None, None, scale)
    else:
        _call(lora_add_, _check.add, y, (y, x, A, B, None, None, table, scaling, None, None, scale))
    return y


def _unusual() -> Any:
    """Whether something is on in this thread that a call of PEFT's modules would see and the kernels would not."""
    return (
        _forward_hooks
        or _forward_pre_hooks
        or _backward_hooks
        or _backward_pre_hooks
        or _autocast()
        or forward_ad._current_level >= 0
    )


def _altered(d: dict) -> Any:
    """Whether calling the module whose ``__dict__`` this is does more than its class's forward."""
    return (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


def _factors(d: dict, modules: dict, names: Any, grad: bool) -> tuple[list[Tensor], list[Tensor], list[float]] | None:
    """(A, B, s) of these adapters; None where there are none or one needs PEFT's forward.

    ``grad``: whether grad mode is on, without which backward hooks are never called.
    """
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, variants, scaling = modules["lora_dropout"]._modules, d["lora_variant"], d["scaling"]
    A: list[Tensor] = []
    B: list[Tensor] = []
    scales: list[float] = []
    for name in names:
        a, b, dropout, scale = lora_A[name], lora_B[name], dropouts[name], scaling[name]
        a_, b_, dropout_ = a.__dict__, b.__dict__, dropout.__dict__
        if (
            name in variants
            or type(a) is not Linear
            or type(b) is not Linear
            or (type(scale) is not float and type(scale) is not int)
            or (type(dropout) is not Identity and (type(dropout) is not Dropout or (dropout.training and dropout.p)))
            # _altered of the three, written out: with many adapters its calls would cost more than all the rest
            or a_["_forward_hooks"]
            or a_["_forward_pre_hooks"]
            or "forward" in a_
            or b_["_forward_hooks"]
            or b_["_forward_pre_hooks"]
            or "forward" in b_
            or dropout_["_forward_hooks"]
            or dropout_["_forward_pre_hooks"]
            or "forward" in dropout_
            or (grad and (_altered(a_) or _altered(b_) or _altered(dropout_)))
        ):
            return None
        a_, b_ = a_["_parameters"], b_["_parameters"]
        a, b = a_["weight"], b_["weight"]
        if type(a) is not Parameter or type(b) is not Parameter or a_["bias"] is not None or b_["bias"] is not None:
            return None
        A.append(a)
        B.append(b)
        scales.append(scale)
    return (A, B, scales) if A else None


def _active(d: dict, modules: dict, names: Any, grad: bool) -> Any:
    """The factors of those active adapters that this layer has."""
    try:
        return _factors(d, modules, names, grad)
    except KeyError:
        lora_A = modules["lora_A"]._modules
        return _factors(d, modules, [name for name in names if name in lora_A], grad)


def _mixed(d: dict, modules: dict, x: Tensor, names: Any, grad: bool) -> tuple[Tensor | None, Any]:
    """(plan table, factors) of a batch whose samples have the adapters ``names``."""
    shape = x.shape
    if len(shape) < 2 or not shape[-1] or len(names) != shape[0]:
        return None, None
    if type(names) is not Names:
        names = Names(names)
    rows = x.numel() // shape[-1]
    adapters, table = names.routing(rows, x)
    try:
        return table, _factors(d, modules, adapters, grad)
    except KeyError:  # this layer lacks one of them
        adapters, table = names.among(modules["lora_A"]._modules).routing(rows, x)
        return table, _factors(d, modules, adapters, grad)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _concatenated(A: list[Tensor], B: list[Tensor], scales: list[float]) -> tuple[list[Tensor], list[Tensor], float]:
    """Several adapters of the same rows as one: Σᵢ sᵢ Bᵢ Aᵢ = s [B₁ … Bₙ] [A₁; …; Aₙ], s inside B where they differ."""
    scale = scales[0]
    if scales.count(scale) != len(scales):
        A = [a.float() for a in A]
        B = [b.float() * s for b, s in zip(B, scales, strict=True)]
        scale = 1.0
    return [torch.cat(A)], [torch.cat(B, 1)], scale


def slow_reason(layer: Any, x: Tensor | None = None) -> str | None:
    """Why a LoRA layer would run PEFT's own forward now; None where it would run fast.

    Args:
        layer: any PEFT LoRA layer, patched or not.
        x: its input; without one, an input of the base weight's dtype and device.
    """
    if (reason := class_reason(type(layer))) is not None:
        return reason
    d = layer.__dict__
    if "forward" in d and getattr(d.get("_old_forward"), "__func__", None) is not FusedMixin.forward:
        return "the layer's forward was replaced on the instance"
    if d["_disable_adapters"]:
        return DISABLED
    if d["merged_adapters"]:
        return MERGED
    base = layer.base_layer
    if type(base) is not Linear:
        return f"base layer is {_name(type(base))}, not torch.nn.Linear"
    if (reason := _module_reason("base layer", base)) is not None:
        return reason
    weight = base.weight
    active = [n for n in layer.active_adapters if n in layer.lora_A]
    if not active:
        return INACTIVE
    dtype, device = (weight.dtype, weight.device) if x is None else (x.dtype, x.device)
    for name in active:
        if (reason := _adapter_reason(layer, name, dtype)) is not None:
            return f"adapter {name!r}: {reason}"
    if weight.requires_grad and torch.is_grad_enabled():
        return "base weight requires grad"
    return _call_reason(layer, weight, x, dtype, device)


def class_reason(cls: type) -> str | None:
    """Why a layer of this class can't have the fast forward; None where it can or does."""
    if not issubclass(cls, PeftLinear):
        return f"{_name(cls)} is not PEFT's LoRA over torch.nn.Linear"
    if not issubclass(cls, FusedMixin):
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
    if variant is not None:
        return _name(type(variant)).removesuffix("LinearVariant") + " variant"
    a, b, dropout, scale = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
    if type(dropout) not in (Identity, Dropout):
        return f"dropout is {_name(type(dropout))}"
    if type(dropout) is Dropout and dropout.training and dropout.p:
        return "dropout in training"
    if _altered(dropout.__dict__):
        return "dropout has hooks"
    for what, module in (("lora_A", a), ("lora_B", b)):
        if type(module) is not Linear:
            return f"{what} is {_name(type(module))}, not torch.nn.Linear"
        if (reason := _module_reason(what, module)) is not None:
            return reason
        if module.bias is not None:
            return f"{what} has a bias"
        if module.weight.dtype not in (dtype, torch.float32):
            return f"{what} is {_dtype(module.weight)}, the input {str(dtype).removeprefix('torch.')}"
    if a.weight.dtype is not b.weight.dtype:
        return f"lora_A is {_dtype(a.weight)}, lora_B {_dtype(b.weight)}"
    if type(scale) not in (float, int):
        return f"scaling is a {_name(type(scale))}"
    return None


def _call_reason(layer: Any, weight: Tensor, x: Tensor | None, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in _check.FLOATS or weight.dtype is not dtype:
        return f"input is {str(dtype).removeprefix('torch.')}, base weight {_dtype(weight)}"
    if len({layer.lora_A[n].weight.dtype for n in layer.active_adapters if n in layer.lora_A}) > 1:
        return "active adapters of different dtypes"
    if not layer.cast_input_dtype_enabled:
        return "input dtype casting is disabled"
    if _autocast():
        return "autocast is on"
    if _unusual():
        return "global module hooks or forward-mode differentiation"
    if x is not None and type(x) is not Tensor:
        return f"input is {_name(type(x))}"
    choice = choose(device.type, lora_add_.backends(), forced_backend())
    if choice.backend == "reference" and forced_backend() is None:
        return choice.reason if device.type != "cpu" else f"{choice.reason} ({extension_error})"
    return None


def _name(cls: type) -> str:
    return cls.__qualname__


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
