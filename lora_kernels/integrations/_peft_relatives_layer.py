"""The class of a patched layer of LoRA's relatives: ``lora`` where it can run, PEFT's own forward where that must."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Dropout, Identity, Linear, Parameter

from ..ops import _check
from ..ops.lora_linear import draw_seed, lora
from ..reference.dropout import threshold
from ._peft_layer import _forced_in_vain, _warn_once
from ._peft_reason import DISABLED, INACTIVE, MERGED, _altered, _backend_reason, _name, _short, base_reason
from ._peft_relatives import CLASSES, Parts, relative_of
from ._peft_state import unusual

SEVERAL = "several active adapters"
_NO_DROPOUT = Identity()


class FusedRelativeMixin:
    """A PEFT layer with a fast forward: no parameter or buffer of its own, nothing in the state dict."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's ``forward``: the same results, errors and dtype."""
        refusal = None
        if not (args or kwargs or is_dynamo_compiling()):
            try:
                y = _forward(self, x)
                if y is not None:
                    return y
            except (RuntimeError, TypeError, ValueError, KeyError) as error:
                if _forced_in_vain(x):
                    raise
                refusal = f"{type(error).__name__}: {error}"
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if refusal is not None and relative_reason(self, x) is None:
            _warn_once(refusal)
        return y

    forward.fast = True  # type: ignore[attr-defined]


def _fixed(cls: type, name: str) -> type:
    """The patched class over ``cls``, importable, so that a patched model can be pickled."""
    fused = type(name, (FusedRelativeMixin, cls), {"__module__": __name__, "__doc__": f"What PEFT's {cls} becomes."})
    setattr(sys.modules[__name__], name, fused)
    return fused


FIXED = {cls: _fixed(cls, f"Fused{tuner.module.capitalize()}{cls.__name__}") for cls, tuner in CLASSES.items()}


def relative_reason(layer: Any, x: Tensor | None = None) -> str | None:
    """Why a layer of LoRA's relatives would run PEFT's own forward now; None where it would run fast.

    Args:
        layer: patched or not.
        x: its input; without one, an input of the base weight's dtype and device.
    """
    found = _look(layer, x)
    return found if isinstance(found, str) else None


def class_refusal(cls: type) -> str | None:
    """Why a layer of this class can't have the fast forward; None where it can or does."""
    forward = getattr(cls, "forward", None)
    if not getattr(forward, "fast", False):
        for known in CLASSES:
            if issubclass(cls, known) and forward is not getattr(known, "forward", None):
                return f"{_name(cls)} has its own forward"
    return None


def unknown(cls: type) -> str:
    """What is said of a layer whose tuner stays PEFT's."""
    return f"not patched: {cls.__module__.removeprefix('peft.tuners.').removesuffix('.layer')}.{_name(cls)}"


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    """The layer's output, or None, with nothing done, where PEFT's own forward must run."""
    found = _look(layer, x)
    if isinstance(found, str):
        return None
    parts, p = found
    base = layer.base_layer
    weight, bias = base.weight, base.bias
    if type(base) is not Linear:
        weight = weight.detach().mT
    A, B, scale = parts.factors()
    seed = draw_seed(x) if threshold(p) else None
    return lora(x, weight, bias, None, scale, A, B, seed, p)


def _look(layer: Any, x: Tensor | None) -> tuple[Parts, float] | str:
    """The adapter's parts and the dropout in force, or why PEFT's own forward must run."""
    cls, d = type(layer), layer.__dict__
    relative = relative_of(cls)
    if relative is None:
        return unknown(cls)
    if (reason := class_refusal(cls)) is not None:
        return reason
    if x is None and "forward" in d and not getattr(d.get("_old_forward", d["forward"]), "fast", False):
        return "the layer's forward was replaced on the instance"
    if d["_disable_adapters"]:
        return DISABLED
    if d["merged_adapters"]:
        return MERGED
    held = getattr(layer, relative.adapters)
    active = [name for name in layer.active_adapters if name in held]
    if not active:
        return INACTIVE
    if len(active) > 1:
        return SEVERAL
    if (reason := base_reason(layer)) is not None:
        return f"{relative.tuner} needs a plain base: {reason}"
    if (reason := _call_reason(layer, x)) is not None:
        return reason
    name, p = active[0], 0.0
    dropout = getattr(layer, relative.dropout)[name] if relative.dropout else _NO_DROPOUT
    if type(dropout) not in (Identity, Dropout):
        return f"adapter {name!r}: dropout is {_name(type(dropout))}"
    if _altered(dropout.__dict__):
        return f"adapter {name!r}: dropout has hooks"
    if type(dropout) is Dropout and dropout.training:
        p = float(dropout.p)
    parts = relative.parts(layer, name)
    if isinstance(parts, str):
        return f"adapter {name!r}: {parts}"
    if (reason := _parts_reason(parts, layer.base_layer.weight)) is not None:
        return f"adapter {name!r}: {reason}"
    return parts, p


def _parts_reason(parts: Parts, weight: Tensor) -> str | None:
    dtype = None
    for what, t in parts.tensors.items():
        if type(t) not in (Tensor, Parameter):
            return f"{what} is {_name(type(t))}"
        if not t.numel():
            return f"{what} is {list(t.shape)} here (a shard, or not gathered)"
        if t.dtype not in (weight.dtype, torch.float32):
            return f"{what} is {_short(t.dtype)}, the input {_short(weight.dtype)}"
        if t.dtype is not (dtype or t.dtype):
            return f"{what} is {_short(t.dtype)}, the others {_short(dtype)}"
        dtype = t.dtype
    if parts.rank > _check.MAX_RANK:
        return f"its rank is {parts.rank}, above {_check.MAX_RANK}"
    return None


def _call_reason(layer: Any, x: Tensor | None) -> str | None:
    weight = layer.base_layer.weight
    of = weight if x is None else x
    if x is not None and type(x) is not Tensor:
        return f"input is {_name(type(x))}"
    if of.dtype not in _check.FLOATS or of.dtype is not weight.dtype:
        return f"input is {_short(of.dtype)}, base weight {_short(weight.dtype)}"
    if not layer.__dict__.get("cast_input_dtype_enabled", True):
        return "input dtype casting is disabled"
    device = of.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return "autocast"
    if unusual():
        return "global module hooks or forward-mode differentiation"
    return _backend_reason(device)
