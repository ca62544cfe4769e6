"""The forward of a patched PEFT LoRA layer: y = x Wᵀ + b + Σᵢ sᵢ (x Aᵢᵀ) Bᵢᵀ, or PEFT's own where that must run.

Whatever could change the result in silence (hooks, dropout, a variant, autocast, another class of module or parameter)
is looked at; what the kernels refuse before they write anything (shapes, dtypes, devices) is left to them, and the call
then goes to PEFT. :func:`slow_reason` says the same in words.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from torch.nn.functional import linear

from ..ops import _check
from ..ops._dispatch import extension_error, forced_backend
from ..ops._low_rank import lora_add_
from ..ops.lora_linear import _LoRALinear
from ..ops.low_rank import _call, _multi_lora
from ..select import choose
from ._peft_batch import NAMES, Names
from ._peft_state import GLOBAL_HOOKS, forget, look, recall, repeat, split

logger = logging.getLogger("lora_kernels")

DISABLED = "base layer only: adapters disabled"
MERGED = "base layer only: adapters merged"
INACTIVE = "base layer only: no active adapter here"
BASE_ONLY = frozenset({DISABLED, MERGED, INACTIVE})

_autocast = torch._C._is_any_autocast_enabled
_compiled, _on_gpu = extension_error is None, lora_add_.has_gpu_kernel()
_add, _native = lora_add_.overload, lora_add_.native


_in_graphs: list[Tensor] = []  # plans and scales that a captured graph reads, which no cache may let go of


class FusedMixin:
    """PEFT's LoRA ``Linear`` with a fast forward: no parameter or buffer of its own, nothing in the state dict."""

    def forward(self, x: Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Tensor:
        """PEFT's ``forward``: the same results, errors and dtype."""
        if adapter_names is None:
            adapter_names = self.__dict__.get(NAMES)
        refusal = None
        if not (args or kwargs):
            try:
                on_gpu = type(x) is Tensor and x.is_cuda
                y = None if on_gpu or is_dynamo_compiling() else repeat(self, x, adapter_names)
                if y is None:
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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``Module._apply``, as ``to`` and its kin call it; the states let go of the weights."""
        forget(self)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; the states let go of the adapter's weights."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        forget(self)  # type: ignore[arg-type]


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
    if type(x) is not Tensor or x.dtype is torch.float64 or _unusual():
        return None
    compiling = is_compiling()
    forced = None if compiling else forced_backend()
    if forced is None and not (_compiled if x.is_cpu else _on_gpu and x.is_cuda):
        return None

    wanted, table = None, None
    if names is not None:
        if compiling:
            return None
        shape = x.shape
        if len(shape) < 2 or not shape[-1] or len(names) != shape[0]:
            return None
        if type(names) is not Names:
            names = Names(names)
        rows = x.numel() // shape[-1]
        wanted, table = names.routing(rows, x)
    state = look(layer, wanted, []) if compiling else recall(layer, wanted)
    if state is None:
        return None
    weight, bias, A, B, scales, adapters, backward_hooks = state
    if wanted and table is not None and len(adapters) != len(wanted):  # this layer lacks some of the batch's
        table = names.among(adapters).routing(rows, x)[1]
    grad = torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, *A, *B)
    if grad and weight.requires_grad:
        return None
    if grad and backward_hooks:
        now = look(layer, wanted, [])  # they may be gone
        if now is None or now.backward_hooks:
            return None

    scale, scaling = scales[0], None
    if table is None:
        if len(A) > 1:
            A, B, scale = _concatenated(A, B, scales)
        if grad:
            return _LoRALinear.apply(x, weight, bias, scale, A[0], B[0])
    else:
        scale, scaling = split(scales, x.device)
    y = linear(x, weight, bias)
    if not compiling and x.is_cuda and torch.cuda.is_current_stream_capturing():
        _in_graphs.extend(t for t in (table, scaling) if t is not None)
    if grad:
        return _multi_lora(x, A, B, None, table, scaling, None, None, y, scale)
    args = (y, x, A, B, None, None, table, scaling, None, None, scale)
    if forced is not None or (x.is_cuda and not compiling):
        _call(lora_add_, _check.add, y, args)
    elif compiling or _native is None or not _native(*args):
        _add(*args)
    return y


def _unusual() -> Any:
    """Whether something is on in this thread that a call of PEFT's modules would see and the kernels would not."""
    return any(GLOBAL_HOOKS) or _autocast() or forward_ad._current_level >= 0


def _altered(d: dict) -> Any:
    """Whether calling the module whose ``__dict__`` this is does more than its class's forward."""
    return (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _concatenated(
    A: list[Tensor], B: list[Tensor], scales: Sequence[float]
) -> tuple[list[Tensor], list[Tensor], float]:
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
