"""A mixed batch, PEFT's ``adapter_names``: handed to the layers without hooks, planned once for all of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel, _adapter_names_pre_forward_hook
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes

from ..plan import BatchPlan

BASE = "__base__"  # PEFT's name for a sample without an adapter
NAMES = "_lora_kernels_adapter_names"  # where a layer finds its samples' adapters while a mixed batch runs

Routing = tuple[tuple[str, ...], Tensor | None]  # the batch's adapters and its plan; no plan: one adapter has every row


class Names(tuple):
    """The adapter of each sample."""

    def __init__(self, names: Any):
        self._routings: dict[Any, Routing] = {}

    def routing(self, rows: int, x: Tensor) -> Routing:
        """The adapters and their plan for ``rows`` rows, made once for all layers and steps."""
        key = rows if x.is_cpu else (rows, x.device)
        routing = self._routings.get(key)
        if routing is None:
            routing = self._routings[key] = _routing(tuple(self), rows, x.device)
        return routing

    def among(self, adapters: Any) -> Names:
        """The same samples at a layer that has only these adapters; the others get none, as in PEFT."""
        return Names(name if name in adapters else BASE for name in self)


@functools.lru_cache(maxsize=16)
def _routing(names: tuple[str, ...], rows: int, device: torch.device) -> Routing:
    adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
    if not adapters or (len(adapters) == 1 and BASE not in names):
        return adapters, None
    slot = {name: i for i, name in enumerate(adapters)}
    with plain_tensors():
        ids = torch.tensor([slot.get(name, -1) for name in names], dtype=torch.int32)
        ids = ids.repeat_interleave(rows // len(names)).to(device)
        return adapters, BatchPlan.from_ids(ids, len(adapters)).table


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors that outlive the call they are made in: autograd may save them, no mode has a hand in them."""
    with torch.inference_mode(False), _disable_current_modes():
        yield


class FusedModelMixin:
    """Passes ``adapter_names`` on as PEFT's hooks do, without a walk through every adapter of every layer."""

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        layers = [] if names is None else _receivers(self)
        if (
            not layers
            or kwargs.get("alora_offsets") is not None
            or (isinstance(beams, int) and beams > 1)
            or not _known(names, layers)
        ):
            with super()._enable_peft_forward_hooks(*args, **kwargs):  # type: ignore[misc]
                yield
            return
        shared, hook = Names(names), partial(_adapter_names_pre_forward_hook, adapter_names=names)
        takers = [layer.__dict__ for layer in layers if _takes_names(layer)]
        handles = [
            layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers if not _takes_names(layer)
        ]
        outer = [d.get(NAMES) for d in takers]
        for d in takers:
            d[NAMES] = shared
        try:
            yield
        finally:
            for d, names in zip(takers, outer, strict=True):
                if names is None:
                    d.pop(NAMES, None)
                else:
                    d[NAMES] = names
            for handle in handles:
                handle.remove()


class FusedLoraModel(FusedModelMixin, LoraModel):
    """What a plain ``peft.LoraModel`` becomes."""


def _receivers(model: Any) -> list[Module]:
    """The modules that PEFT gives ``adapter_names``; of a LoRA layer only the base layer is searched further."""
    found: dict[int, Module] = {}
    lora: dict[type, bool | None] = {}
    stack: list[Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in found:
            continue
        cls = type(module)
        if cls not in lora:
            lora[cls] = (
                True if issubclass(cls, LoraLayer) else False if issubclass(cls, AuxiliaryTrainingWrapper) else None
            )
        if lora[cls] is not None:
            found[id(module)] = module
        stack += (module._modules["base_layer"],) if lora[cls] else module._modules.values()
    return list(found.values())


def _known(names: Any, layers: list[Module]) -> bool:
    """Whether each name is an adapter of some layer."""
    missing = set(names) - {BASE}
    for layer in layers:
        if not missing:
            break
        if isinstance(layer, LoraLayer):
            missing -= layer.lora_A.keys()
            missing -= layer.lora_embedding_A.keys()
    return not missing


def _takes_names(layer: Module) -> bool:
    return getattr(type(layer).forward, "takes_names", False) and "forward" not in layer.__dict__
