"""``lora_kernels.patch``: the adapter layers of a PEFT model on the package's kernels, in place.

A layer changes its class and nothing else, so parameters, state dict, hooks, saving, merging and adding adapters stay
PEFT's; unpatching changes the class back. Each call of a layer decides for itself whether it can run fast, and runs
PEFT's own forward where it can't.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import Module

try:
    from peft.tuners.adalora.model import AdaLoraModel
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError("lora_kernels.patch needs PEFT: pip install 'lora_kernels[peft]'") from error

from ._peft_batch import FusedLoraModel, FusedModelMixin
from ._peft_layer import FusedLinear, FusedMixin
from ._peft_packed import restore
from ._peft_reason import BASE_ONLY, beside_reason, class_reason, slow_reason
from ._peft_relatives import CLASSES, relative_of
from ._peft_relatives_layer import FIXED, FusedRelativeMixin, class_refusal, relative_reason
from ._peft_rotation import CLASSES as ROTATIONS
from ._peft_rotation import FIXED as FIXED_ROTATIONS
from ._peft_rotation import FusedRotationMixin, rotation_of, rotation_reason
from ._peft_rotation import class_refusal as rotation_refusal
from ._peft_spectral import CLASSES as SPECTRAL
from ._peft_spectral import tuner_of
from ._peft_spectral_layer import FIXED as FIXED_SPECTRAL
from ._peft_spectral_layer import FusedSpectralMixin, spectral_reason
from ._peft_spectral_layer import class_refusal as spectral_refusal
from ._peft_state import forget

logger = logging.getLogger("lora_kernels")

FAST = "fast"
BESIDE = "beside the base layer's own forward"
UNPATCHED = "not patched (call patch again)"


def patch(model: Module, *, strict: bool = False) -> Handle:
    """Give the adapter layers of a PEFT model the fast forward; results, state dict and behaviour stay PEFT's.

    Calling it again takes in the layers that were added since; layers that are fast already stay as they are.

    Args:
        model: a model with PEFT adapters (``PeftModel``, or any module that holds ``peft``'s layers): LoRA's, and those
            of the tuners that are LoRA with another core or scale, a sparse spectrum, or a rotation of blocks.
        strict: raise unless every layer would run fast now.

    Returns:
        A handle: ``report()`` says what runs fast and why the rest does not, ``unpatch()`` undoes it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no PEFT adapter layer; or ``strict``, and layers would stay slow. Nothing is changed then.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = _adapter_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEFT adapter layer: add an adapter before lora_kernels.patch")
    slow = {name: why for name, layer in layers.items() if (why := _reason(layer)) and why not in BASE_ONLY}
    if strict and slow:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in slow.items())
        raise ValueError(f"{len(slow)} of {len(layers)} adapter layers would stay slow:{lines}")
    if len(slow) == len(layers):
        reason, count = Counter(slow.values()).most_common(1)[0]
        logger.warning("patch: none of the %d adapter layers runs fast; %d: %s", len(layers), count, reason)
    for module in model.modules():
        if _can_be_fast(type(module)):
            module.__class__ = _fused(type(module))  # type: ignore[arg-type]
            if isinstance(module, FusedMixin):
                restore(module.base_layer)
    return Handle(model)


def _adapter_layers(model: Module) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


class Way(NamedTuple):
    """How layers of some tuners beside LoRA become fast: whose classes, what may speak against it, and their mixin."""

    known: Callable[[type], Any]
    refusal: Callable[[type], str | None]
    reason: Callable[[Any], str | None]
    mixin: type


_WAYS = (
    Way(relative_of, class_refusal, relative_reason, FusedRelativeMixin),
    Way(tuner_of, spectral_refusal, spectral_reason, FusedSpectralMixin),
    Way(rotation_of, rotation_refusal, rotation_reason, FusedRotationMixin),
)


def _way_of(cls: type) -> Way | None:
    return next((way for way in _WAYS if way.known(cls) is not None), None)


def _can_be_fast(cls: type) -> bool:
    if (way := _way_of(cls)) is not None:
        return way.refusal(cls) is None
    if issubclass(cls, LoraModel):
        return not issubclass(cls, AdaLoraModel)  # which has no mixed batches
    return issubclass(cls, LoraLayer) and class_reason(cls) is None


def _reason(layer: BaseTunerLayer) -> str | None:
    """Why a layer would run PEFT's own forward now; None where it would run fast."""
    if (way := _way_of(type(layer))) is not None:
        return way.reason(layer)
    return slow_reason(layer) if isinstance(layer, LoraLayer) else relative_reason(layer)


_MIXINS = (FusedMixin, FusedModelMixin, *(way.mixin for way in _WAYS))
_FIXED: dict[Any, type] = {PeftLinear: FusedLinear, LoraModel: FusedLoraModel}
_FIXED |= {**FIXED, **FIXED_SPECTRAL, **FIXED_ROTATIONS}  # importable, so that pickle finds them


#: What PEFT's layers over quantised ones become, and where PEFT has these: imported only where a model has them.
_QUANTISED = {
    "FusedLinear8bitLt": "peft.tuners.lora.bnb",
    "FusedLinear4bit": "peft.tuners.lora.bnb",
    "FusedGPTQLoraLinear": "peft.tuners.lora.gptq",
    "FusedAwqLoraLinear": "peft.tuners.lora.awq",
}


def __getattr__(name: str) -> Any:
    """So that pickle finds the patched classes over quantised layers."""
    if name not in _QUANTISED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _fused(getattr(importlib.import_module(_QUANTISED[name]), name.removeprefix("Fused")))


@functools.cache
def _fused(cls: type) -> type:
    """The class over ``cls`` that runs fast."""
    way = _way_of(cls)
    mixin: type = FusedMixin if way is None else way.mixin
    if issubclass(cls, LoraModel):
        mixin = FusedModelMixin
    if issubclass(cls, mixin):
        return cls
    name = f"Fused{cls.__name__}"
    module = __name__ if _QUANTISED.get(name) == cls.__module__ else cls.__module__
    return _FIXED.get(cls) or type(name, (mixin, cls), {"__module__": module})


def _unfused(cls: type) -> type:
    """The class that :func:`_fused` was given; where a wrapper (FSDP, parametrize) derived from its result, the same
    wrapper over that class."""
    if not issubclass(cls, _MIXINS):
        return cls
    if cls.__bases__[0] in _MIXINS:
        return cls.__bases__[1]
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(_unfused(base) for base in cls.__bases__), own)


def tuners() -> list[tuple[str, str, str]]:
    """The tuners beside LoRA whose layers can run fast here: PEFT's module, the name, and what it adds to y."""
    known: list[Any] = [*CLASSES.values(), *SPECTRAL.values(), *ROTATIONS.values()]
    return [(tuner.module, tuner.tuner, tuner.formula) for tuner in known]


class Handle:
    """What :func:`patch` did to a model. It looks at the model anew each time, so it covers later changes too."""

    def __init__(self, model: Module):
        self.model = model

    def report(self) -> Report:
        """Which adapter layers run fast in the model's present state, and why the others don't."""
        layers, classes, adapters = {}, {}, {}
        for name, layer in _adapter_layers(self.model).items():
            reason = _reason(layer)
            if reason is None and not isinstance(layer, _MIXINS):
                reason = UNPATCHED
            beside = reason is None and not isinstance(layer, (FusedSpectralMixin, FusedRotationMixin))  # whose base is
            if beside and (base := beside_reason(layer)) is not None:
                reason = f"{FAST} {BESIDE}: {base}"
            layers[name] = reason or FAST
            classes[name] = type(layer).__name__
            adapters.update(dict.fromkeys(layer.active_adapters))
        state = (
            f"active {', '.join(adapters) or 'none'}; {'training' if self.model.training else 'eval'} mode; "
            f"gradients {'on' if torch.is_grad_enabled() else 'off'}"
        )
        return Report(layers, classes, state)

    def unpatch(self) -> None:
        """Give every layer its class back; a second call finds nothing to do."""
        for module in self.model.modules():
            if isinstance(module, _MIXINS):
                module.__class__ = _unfused(type(module))
                forget(module)

    def __repr__(self) -> str:
        what, report = type(self.model).__name__, self.report()
        return f"<lora_kernels.patch of {what}: {report.fast} of {report.total} adapter layers fast>"


@dataclass(frozen=True)
class Report:
    """What runs fast. ``print(report)`` shows it as a table.

    Attributes:
        layers: a layer's name -> ``"fast"``, with why the base layer runs by its own forward where it does; or why
            PEFT's forward runs.
        classes: a layer's name -> the name of its class.
        state: what it was decided for: active adapters, training or eval mode, gradients.
    """

    layers: dict[str, str]
    classes: dict[str, str]
    state: str

    @property
    def fast(self) -> int:
        """How many layers run fast."""
        return sum(reason.startswith(FAST) for reason in self.layers.values())

    @property
    def total(self) -> int:
        """How many adapter layers the model has."""
        return len(self.layers)

    def __str__(self) -> str:
        lines = [f"{self.fast} of {self.total} adapter layers fast ({self.state})", ""]
        lines += _table(Counter(zip(self.layers.values(), self.classes.values(), strict=True)), ("runs", "class"))
        lines += [""]
        lines += _table(Counter((_numberless(name), reason) for name, reason in self.layers.items()), ("layer", "runs"))
        return "\n".join(lines)


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _table(rows: Counter[tuple[str, str]], titles: tuple[str, str]) -> list[str]:
    width = max(len(first) for first, _ in [titles, *rows])
    return [
        f"{'count':>6}  {titles[0]:<{width}}  {titles[1]}",
        *(f"{count:>6}  {first:<{width}}  {second}" for (first, second), count in rows.items()),
    ]
