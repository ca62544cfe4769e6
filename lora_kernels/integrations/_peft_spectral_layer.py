"""The class of a patched layer of PEFT's spectral tuners: ``spectral_linear`` beside the base layer's own forward where
it can run, PEFT's own forward where that must."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ..ops import _check
from ..ops._dispatch import extension_error, forced_backend
from ..ops._spectral import spectral_linear as linear_op
from ..ops.spectral import spectral_delta_weight, spectral_linear
from ._peft_layer import _forced_in_vain, _warn_once
from ._peft_reason import DISABLED, INACTIVE, MERGED, _backend_reason, _name, _short
from ._peft_relatives_layer import unknown
from ._peft_spectral import CLASSES, Spectrum, spectrum_of, tuner_of

_compiled = extension_error is None


class Refused(RuntimeError):
    """The kernels refused what was thought to suit them."""


class FusedSpectralMixin:
    """A PEFT layer with a fast forward and a fast ΔW: no parameter or buffer of its own, nothing in the state dict."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's ``forward``: the same results, errors and dtype."""
        refusal = None
        if not is_dynamo_compiling():
            try:
                y = _forward(self, x, args, kwargs)
                if y is not None:
                    return y
            except Refused as error:
                refusal = str(error)
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if refusal is not None:
            _warn_once(refusal)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's: ΔW in the spectrum's dtype, which merging, unmerging and PEFT's own forward take."""
        found = None if is_dynamo_compiling() else _mergeable(self, adapter)
        if found is None:
            return super().get_delta_weight(adapter)  # type: ignore[misc]
        return spectral_delta_weight(found.values, found.plan, kind=found.kind, scale=found.scale)

    forward.fast = get_delta_weight.fast = True  # type: ignore[attr-defined]


def _fixed(cls: type) -> type:
    """The patched class over ``cls``, importable, so that a patched model can be pickled."""
    name, doc = f"Fused{cls.__name__}", f"What PEFT's {cls.__name__} becomes."
    fused = type(name, (FusedSpectralMixin, cls), {"__module__": __name__, "__doc__": doc})
    setattr(sys.modules[__name__], name, fused)
    return fused


FIXED = {cls: _fixed(cls) for cls in CLASSES}


def spectral_reason(layer: Any, x: Tensor | None = None) -> str | None:
    """Why a layer of the spectral tuners would run PEFT's own forward now; None where it would run fast.

    Args:
        layer: patched or not.
        x: its input; without one, an input of the base weight's dtype on the spectrum's device.
    """
    found = _look(layer, x)
    return found if isinstance(found, str) else None


def class_refusal(cls: type) -> str | None:
    """Why a layer of this class can't have the fast forward; None where it can or does."""
    for method in ("forward", "get_delta_weight"):
        own = getattr(cls, method)
        if not getattr(own, "fast", False) and all(own is not getattr(known, method) for known in CLASSES):
            return f"{_name(cls)} has its own {method}"
    return None


def _forward(layer: Any, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output, or None, with nothing done, where PEFT's own forward must run."""
    found = _look(layer, x)
    if isinstance(found, str):
        return None
    y = layer.base_layer(x, *args, **kwargs)
    if len(found) > 1 and y.dtype in (torch.bfloat16, torch.float16):
        y = y.float()  # rounded once, after the last one
    try:
        for spectrum in found:
            y = _added(y, x, spectrum)
    except (RuntimeError, TypeError, ValueError) as error:
        if _forced_in_vain(x, linear_op):
            raise
        raise Refused(f"{type(error).__name__}: {error}") from error
    return y.to(x.dtype)


def _added(y: Tensor, x: Tensor, spectrum: Spectrum) -> Tensor:
    """y + x ΔWᵀ, in one go where y is what the kernels take."""
    values, plan, kind, scale = spectrum
    if type(y) is Tensor and y.dtype in (x.dtype, torch.float32):
        return spectral_linear(x, values, plan, kind=kind, scale=scale, y=y)
    return y + spectral_linear(x, values, plan, kind=kind, scale=scale)


def _mergeable(layer: Any, name: str) -> Spectrum | None:
    """An adapter whose ΔW the kernels may make; None where PEFT must."""
    tuner = tuner_of(type(layer))
    if tuner is None or name not in getattr(layer, tuner.values):
        return None
    found = spectrum_of(layer, tuner, name)
    if isinstance(found, str) or _call_reason(found.values.dtype, found.values.device) is not None:
        return None
    return found


def _look(layer: Any, x: Tensor | None) -> list[Spectrum] | str:
    """The active adapters, or why PEFT's own forward must run."""
    d, tuner = layer.__dict__, tuner_of(type(layer))
    if tuner is None:
        return unknown(type(layer))
    if (reason := class_refusal(type(layer))) is not None:
        return reason
    if "get_delta_weight" in d:
        return "the layer's get_delta_weight was replaced on the instance"
    if x is None and "forward" in d and not getattr(d.get("_old_forward", d["forward"]), "fast", False):
        return "the layer's forward was replaced on the instance"
    if d["_disable_adapters"]:
        return DISABLED
    if d["merged_adapters"]:
        return MERGED
    held = getattr(layer, tuner.values)
    active = [name for name in layer.active_adapters if name in held]
    if not active:
        return INACTIVE
    if x is not None and type(x) is not Tensor:
        return f"input is {_name(type(x))}"
    dtype, device = _input(layer, held[active[0]]) if x is None else (x.dtype, x.device)
    if (reason := _call_reason(dtype, device)) is not None:
        return reason
    if not d.get("cast_input_dtype_enabled", True):
        return "input dtype casting is disabled"
    spectra = []
    for name in active:
        found = spectrum_of(layer, tuner, name)
        if isinstance(found, str):
            return f"adapter {name!r}: {found}"
        if found.values.dtype not in (dtype, torch.float32):
            return f"adapter {name!r}: its spectrum is {_short(found.values.dtype)}, the input {_short(dtype)}"
        if found.values.device != device:
            return f"adapter {name!r}: its spectrum is on {found.values.device}, the input on {device}"
        spectra.append(found)
    return spectra


def _input(layer: Any, values: Tensor) -> tuple[torch.dtype, torch.device]:
    """Those of an input that the layer is made for."""
    weight = getattr(layer.get_base_layer(), "weight", values)
    return (weight if weight.is_floating_point() else values).dtype, values.device


def _call_reason(dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in _check.FLOATS:
        return f"input is {_short(dtype)}"
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return "autocast"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "forward-mode differentiation or torch.func"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if _compiled and device.type == "cpu" and forced_backend() is None:
        return None
    return _backend_reason(device.type, linear_op)
