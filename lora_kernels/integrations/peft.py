"""``lora_kernels.patch``: the LoRA layers of a PEFT model on the package's kernels, in place.

A layer changes its class and nothing else, so parameters, state dict, hooks, saving, merging and adding adapters stay
PEFT's; unpatching changes the class back. Each call of a layer decides for itself whether it can run fast, and runs
PEFT's own forward where it can't.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn import Module

try:
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.model import LoraModel
except ImportError as error:
    raise ImportError("lora_kernels.patch needs PEFT: pip install 'lora_kernels[peft]'") from error

from ._peft_batch import FusedLoraModel, FusedModelMixin
from ._peft_layer import BASE_ONLY, FusedLinear, FusedMixin, class_reason, slow_reason
from ._peft_state import forget

logger = logging.getLogger("lora_kernels")

FAST = "fast"
UNPATCHED = "not patched (call patch again)"


def patch(model: Module, *, strict: bool = False) -> Handle:
    """Give the LoRA layers of a PEFT model the fast forward; results, state dict and behaviour stay PEFT's.

    Calling it again takes in the layers that were added since; layers that are fast already stay as they are.

    Args:
        model: a model with PEFT LoRA adapters (``PeftModel``, or any module that holds ``peft`` LoRA layers).
        strict: raise unless every layer would run fast now.

    Returns:
        A handle: ``report()`` says what runs fast and why the rest does not, ``unpatch()`` undoes it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no PEFT LoRA layer; or ``strict``, and layers would stay slow. Nothing is changed then.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEFT LoRA layer: add an adapter before lora_kernels.patch")
    slow = {name: why for name, layer in layers.items() if (why := slow_reason(layer)) and why not in BASE_ONLY}
    if strict and slow:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in slow.items())
        raise ValueError(f"{len(slow)} of {len(layers)} LoRA layers would stay slow:{lines}")
    if len(slow) == len(layers):
        reason, count = Counter(slow.values()).most_common(1)[0]
        logger.warning("patch: none of the %d LoRA layers runs fast; %d: %s", len(layers), count, reason)
    for module in model.modules():
        if isinstance(module, LoraModel) or (isinstance(module, LoraLayer) and class_reason(type(module)) is None):
            module.__class__ = _fused(type(module))  # type: ignore[arg-type]
    return Handle(model)


def _lora_layers(model: Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


_FIXED = {PeftLinear: FusedLinear, LoraModel: FusedLoraModel}  # importable, so that a patched model can be pickled


@functools.cache
def _fused(cls: type) -> type:
    """The class over ``cls`` that runs fast."""
    mixin = FusedModelMixin if issubclass(cls, LoraModel) else FusedMixin
    if issubclass(cls, mixin):
        return cls
    return _FIXED.get(cls) or type(f"Fused{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def _unfused(cls: type) -> type:
    """The class that :func:`_fused` was given; where a wrapper (FSDP, parametrize) derived from its result, the same
    wrapper over that class."""
    if not issubclass(cls, (FusedMixin, FusedModelMixin)):
        return cls
    if cls.__bases__[0] in (FusedMixin, FusedModelMixin):
        return cls.__bases__[1]
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(_unfused(base) for base in cls.__bases__), own)


class Handle:
    """What :func:`patch` did to a model. It looks at the model anew each time, so it covers later changes too."""

    def __init__(self, model: Module):
        self.model = model

    def report(self) -> Report:
        """Which LoRA layers run fast in the model's present state, and why the others don't."""
        layers, classes, adapters = {}, {}, {}
        for name, layer in _lora_layers(self.model).items():
            reason = slow_reason(layer)
            if reason is None and not isinstance(layer, FusedMixin):
                reason = UNPATCHED
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
            if isinstance(module, (FusedMixin, FusedModelMixin)):
                module.__class__ = _unfused(type(module))
                forget(module)

    def __repr__(self) -> str:
        report = self.report()
        return f"<lora_kernels.patch of {type(self.model).__name__}: {report.fast} of {report.total} LoRA layers fast>"


@dataclass(frozen=True)
class Report:
    """What runs fast. ``print(report)`` shows it as a table.

    Attributes:
        layers: a layer's name -> ``"fast"``, or why PEFT's own forward runs.
        classes: a layer's name -> the name of its class.
        state: what it was decided for: active adapters, training or eval mode, gradients.
    """

    layers: dict[str, str]
    classes: dict[str, str]
    state: str

    @property
    def fast(self) -> int:
        """How many layers run fast."""
        return sum(reason == FAST for reason in self.layers.values())

    @property
    def total(self) -> int:
        """How many LoRA layers the model has."""
        return len(self.layers)

    def __str__(self) -> str:
        lines = [f"{self.fast} of {self.total} LoRA layers fast ({self.state})", ""]
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
