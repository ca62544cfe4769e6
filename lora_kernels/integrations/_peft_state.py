"""What a PEFT LoRA layer was found to be, kept while it stays so.

Finding it out takes some hundred reads, and it must cost a microsecond or two with the layer's objects in no cache. So
each dictionary entry and type that was read is noted beside the result, and the compiled extension holds these facts
against the layer as it is at the next call, in one loop (``csrc/python/layers.h``). A hook that is registered moves a
counter, which is held against what it was. What is kept belongs to the entry ``_lora_kernels_states`` of the layer's
``__dict__``, which :func:`forget` takes away.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from torch.nn.modules import module as _globals
from torch.utils.hooks import RemovableHandle

from ..ops._dispatch import extension, forced_backend
from ._peft_batch import plain_tensors

ABSENT = ...  # the value of a fact where the dictionary lacks the key
ITEMS = ...  # the key of a fact about a list's items, or about an empty dictionary

#: Hooks of every module, empty while a patched layer runs fast.
GLOBAL_HOOKS = (
    _globals._global_forward_hooks,
    _globals._global_forward_pre_hooks,
    _globals._global_backward_hooks,
    _globals._global_backward_pre_hooks,
)

Wanted = tuple[str, ...] | None  # the adapters of a mixed batch; None: the layer's active ones


class State(NamedTuple):
    """A layer that can run fast: ``adapters`` are those of the wanted ones that it has, the factors in their order."""

    weight: Parameter
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    scales: tuple[float, ...]
    adapters: tuple[str, ...]
    backward_hooks: bool


def recall(layer: Module, wanted: Wanted) -> State | None:
    """The state of the layer, looked up anew if anything read of it has changed; None where PEFT's forward must run."""
    if extension is None:
        return look(layer, wanted, [])
    state = extension.recall(layer, wanted)
    if state is None:
        facts: list[Any] = [vars(forward_ad), "_current_level", forward_ad._current_level]
        for hooks in GLOBAL_HOOKS:
            facts.extend((hooks, ITEMS, ()))
        hooks_made = RemovableHandle.next_id
        state = look(layer, wanted, facts)
        if state is not None:
            extension.remember(layer, wanted, hooks_made, state, facts, _call(state, wanted))
    return state


def _call(state: State, wanted: Wanted) -> tuple | None:
    """What the compiled forward adds to the base layer's output, None where it is left to Python."""
    if len(state.adapters) != (1 if wanted is None else len(wanted)):
        return None
    scale, scaling = split(state.scales, state.weight.device)
    return state.weight, state.bias, state.A, state.B, scaling, scale


def forget(layer: Module) -> None:
    """Let go of all states of the layer."""
    if extension is not None:
        extension.forget(layer)


def _repeat(layer: Any, x: Tensor, names: Any) -> Tensor | None:
    """The output of a layer that is as it was at an earlier call; None, with nothing done, where it may not be so.

    In one compiled call, for what a model's step consists of: no gradients, one adapter or a mixed batch whose routing
    is known, nothing that is to see the ops called.

    Args:
        names: None, or :class:`Names`.
    """
    return None


if extension is not None:
    extension.connect_layers(RemovableHandle, (torch.is_grad_enabled, forced_backend))
repeat = _repeat if extension is None else extension.repeat


@functools.lru_cache(maxsize=64)
def split(scales: tuple[float, ...], device: torch.device) -> tuple[float, Tensor | None]:
    """(what all adapters are scaled by, fp32 [L] of what each is besides, or None), made once."""
    if scales.count(scales[0]) == len(scales):
        return scales[0], None
    with plain_tensors():
        return 1.0, torch.tensor(scales, dtype=torch.float32, device=device)


def look(layer: Module, wanted: Wanted, facts: list[Any]) -> State | None:
    """The state of the layer, None where PEFT's forward must run; fills in the facts it rests on."""

    def read(holder: dict, key: str) -> Any:
        value = holder.get(key, ABSENT)
        facts.extend((holder, key, value))
        return value

    def is_plain(module: Module, *kinds: type) -> bool:
        kind, d = type(module), module.__dict__
        facts.extend((module, None, kind))
        hooks = [read(d, key) for key in ("_forward_hooks", "_forward_pre_hooks")]
        for held in hooks:
            facts.extend((held, ITEMS, ()))
        return kind in kinds and read(d, "forward") is ABSENT and not any(hooks)

    def parameters(module: Module) -> tuple[Any, Any]:
        held = read(module.__dict__, "_parameters")
        return read(held, "weight"), read(held, "bias")

    def items(held: Any) -> tuple | None:
        if type(held) is not list:
            return None
        found = tuple(held)
        facts.extend((held, ITEMS, found))
        return found

    d = layer.__dict__
    if items(read(d, "merged_adapters")) != ():
        return None
    if wanted is None:
        active = read(d, "_active_adapter")
        wanted = (active,) if type(active) is str else items(active)
        if wanted is None:
            return None
    if read(d, "_disable_adapters") or not read(d, "cast_input_dtype_enabled"):
        return None
    modules = read(d, "_modules")
    base = read(modules, "base_layer")
    if not is_plain(base, Linear) or _has_backward_hooks(base):
        return None
    weight, bias = parameters(base)
    if type(weight) is not Parameter:
        return None
    members = [read(modules, key) for key in ("lora_A", "lora_B", "lora_dropout")]
    if ABSENT in members:
        return None
    lora_A, lora_B, dropouts = (read(module.__dict__, "_modules") for module in members)
    variants, scaling = read(d, "lora_variant"), read(d, "scaling")
    A: list[Tensor] = []
    B: list[Tensor] = []
    scales, adapters, backward_hooks = [], [], False
    for name in wanted:
        a = read(lora_A, name)
        if a is ABSENT:
            continue
        b, dropout, scale = read(lora_B, name), read(dropouts, name), read(scaling, name)
        if (
            read(variants, name) is not ABSENT
            or not is_plain(a, Linear)
            or not is_plain(b, Linear)
            or not is_plain(dropout, Identity, Dropout)
            or (type(dropout) is Dropout and read(dropout.__dict__, "training") and read(dropout.__dict__, "p"))
            or type(scale) not in (float, int)
        ):
            return None
        (a_weight, a_bias), (b_weight, b_bias) = parameters(a), parameters(b)
        if (
            type(a_weight) is not Parameter
            or type(b_weight) is not Parameter
            or a_bias is not None
            or b_bias is not None
        ):
            return None
        A.append(a_weight)
        B.append(b_weight)
        scales.append(scale)
        adapters.append(name)
        backward_hooks = backward_hooks or any(map(_has_backward_hooks, (a, b, dropout)))
    if not A:
        return None
    return State(weight, bias, A, B, tuple(scales), tuple(adapters), backward_hooks)


def _has_backward_hooks(module: Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)
