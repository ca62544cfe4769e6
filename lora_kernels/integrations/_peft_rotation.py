"""The class of a patched BOFT layer: rows of x are turned block by block, where PEFT builds a matrix as wide as x."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module, Parameter

from ..ops.structured import block_rotate, cayley
from ._peft_layer import _warn_once
from ._peft_reason import DISABLED, INACTIVE, MERGED, _name, _short
from ._peft_relatives import peft_class
from ._peft_relatives_layer import SEVERAL
from ._peft_spectral_layer import _call_reason


class Rotation(NamedTuple):
    """A tuner's layer class: its name and what it makes of y, for people, and where PEFT has the class."""

    tuner: str
    formula: str
    module: str
    cls: str


BOFT = Rotation("BOFT", "s ∘ W R x with R of blocks (I - S)(I + S)⁻¹", "boft", "Linear")

CLASSES = {cls: BOFT for cls in (peft_class(BOFT.module, BOFT.cls),) if cls is not None}


def rotation_of(cls: type) -> Rotation | None:
    """BOFT where a class is that of its linear layers, or derives from it."""
    return next((CLASSES[base] for base in cls.__mro__ if base in CLASSES), None)


class FusedRotationMixin:
    """A PEFT layer with a fast forward: no parameter or buffer of its own, nothing in the state dict."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's ``forward``: the same results, errors and dtype."""
        refusal = None
        if not is_dynamo_compiling() and not isinstance(found := _look(self, x), str):
            try:
                rotated = _rotated(x, *found)
            except (RuntimeError, TypeError, ValueError) as error:
                refusal = f"{type(error).__name__}: {error}"
            else:
                return _scaled(self, self.base_layer(rotated, *args, **kwargs), found[1]).to(x.dtype)  # type: ignore[attr-defined]
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if refusal is not None:
            _warn_once(refusal)
        return y

    forward.fast = True  # type: ignore[attr-defined]


def _fixed(cls: type) -> type:
    """The patched class over ``cls``, importable, so that a patched model can be pickled."""
    name, doc = "FusedBOFTLinear", "What PEFT's BOFT Linear becomes."
    fused = type(name, (FusedRotationMixin, cls), {"__module__": __name__, "__doc__": doc})
    setattr(sys.modules[__name__], name, fused)
    return fused


FIXED = {cls: _fixed(cls) for cls in CLASSES}


def rotation_reason(layer: Any, x: Tensor | None = None) -> str | None:
    """Why a BOFT layer would run PEFT's own forward now; None where it would run fast.

    Args:
        layer: patched or not.
        x: its input; without one, an input of the base weight's dtype on the adapter's device.
    """
    found = _look(layer, x)
    return found if isinstance(found, str) else None


def class_refusal(cls: type) -> str | None:
    """Why a layer of this class can't have the fast forward; None where it can or does."""
    own = getattr(cls, "forward", None)
    if not getattr(own, "fast", False) and all(own is not getattr(known, "forward", None) for known in CLASSES):
        return f"{_name(cls)} has its own forward"
    return None


def _rotated(x: Tensor, data: Tensor, scale: Tensor, dropout: Module) -> Tensor:
    """x R, with R the Cayley transforms of the blocks' skew parts, some of them left out by the dropout."""
    R = dropout(cayley((data - data.mT) / 2))
    return block_rotate(x, R[0])


def _scaled(layer: Any, y: Tensor, scale: Tensor) -> Tensor:
    """s ∘ (y - bias) + bias."""
    s, bias = scale.flatten(), layer.base_layer.bias
    return y * s if bias is None else torch.addcmul((1 - s) * bias, y, s)


def _look(layer: Any, x: Tensor | None) -> tuple[Tensor, Tensor, Module] | str:
    """The active adapter's blocks [1, D, b, b], scale [N, 1] and dropout, or why PEFT's own forward must run."""
    d = layer.__dict__
    if (reason := class_refusal(type(layer))) is not None:
        return reason
    if x is None and "forward" in d and not getattr(d.get("_old_forward", d["forward"]), "fast", False):
        return "the layer's forward was replaced on the instance"
    if d["_disable_adapters"]:
        return DISABLED
    if d["merged_adapters"]:
        return MERGED
    active = [name for name in layer.active_adapters if name in layer.boft_R]
    if not active:
        return INACTIVE
    if len(active) > 1:
        return SEVERAL
    name = active[0]
    data, scale, dropout = layer.boft_R[name], layer.boft_s[name], layer.boft_dropout[name]
    for t in (data, scale):
        if type(t) not in (Tensor, Parameter):
            return f"adapter {name!r}: its blocks are {_name(type(t))}"
        if t.dtype != torch.float32:
            return f"adapter {name!r}: its blocks are {_short(t.dtype)}"
    if data.dim() != 4 or data.shape[0] != 1:
        return f"adapter {name!r}: it has butterfly factors"
    weight = getattr(layer.get_base_layer(), "weight", data)
    of = x if x is not None else weight if weight.is_floating_point() else data
    if x is not None and type(x) is not Tensor:
        return f"input is {_name(type(x))}"
    if of.device != data.device:
        return f"adapter {name!r}: its blocks are on {data.device}, the input on {of.device}"
    if (reason := _call_reason(of.dtype, of.device)) is not None:
        return reason
    return data, scale, dropout
