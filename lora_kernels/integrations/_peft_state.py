"""What a PEFT LoRA layer was found to be, kept while it stays so.

Finding it out takes some hundred reads, and it must cost a few microseconds with the layer's objects in no cache. So
each dictionary entry and type that was read is noted beside the result, and the next call holds these facts against the
layer as it is then, in one compiled loop. A hook that is registered moves a counter, which is held against what it was.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from torch.utils.hooks import RemovableHandle

from ..ops._dispatch import ABSENT, lines_of, unchanged

MOST = 4  # states kept of a layer; each takes some kilobytes


class State(NamedTuple):
    """A layer that can run fast: ``adapters`` are those of the wanted ones that it has, the factors in their order."""

    weight: Parameter
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    scales: tuple[float, ...]
    adapters: tuple[str, ...]
    backward_hooks: bool
    lines: bytes


class _Known(NamedTuple):
    state: State
    facts: tuple
    hooks_made: int


#: id of a layer -> (the layer, its states by wanted adapters). Not in the layer: it would refer to itself, and copies
#: of it would refer to it.
_layers: dict[int, tuple[weakref.ref, dict[tuple[str, ...], _Known]]] = {}


def recall(layer: Module, wanted: tuple[str, ...]) -> State | None:
    """The state of the layer, looked up anew if anything read of it has changed; None where PEFT's forward must run."""
    entry = _layers.get(id(layer))
    known = None if entry is None else entry[1].get(wanted)
    if known is not None and known.hooks_made == RemovableHandle.next_id:
        if unchanged(known.facts, known.state.lines):
            return known.state
        forget(layer)  # what the other states hold may be out of use as well
    facts: list[Any] = []
    hooks_made = RemovableHandle.next_id
    state = look(layer, wanted, facts)
    if state is None:
        if known is not None:
            forget(layer)
        return None
    state = state._replace(lines=lines_of([state.weight, *state.A, *state.B]))
    key = id(layer)
    states = _layers.setdefault(key, (weakref.ref(layer, lambda _: _layers.pop(key, None)), {}))[1]
    if len(states) >= MOST:
        states.pop(next(iter(states)), None)
    states[wanted] = _Known(state, tuple(facts), hooks_made)
    return state


def forget(layer: Module) -> None:
    """Let go of all states of the layer."""
    _layers.pop(id(layer), None)


def look(layer: Module, wanted: tuple[str, ...], facts: list[Any]) -> State | None:
    """The state of the layer, None where PEFT's forward must run; fills in the facts it rests on."""

    def read(holder: dict, key: str) -> Any:
        value = holder.get(key, ABSENT)
        facts.extend((holder, key, value))
        return value

    def is_plain(module: Module, *kinds: type) -> bool:
        kind, d = type(module), module.__dict__
        facts.extend((module, None, kind))
        hooks = [read(d, key) for key in ("_forward_hooks", "_forward_pre_hooks")]
        return kind in kinds and read(d, "forward") is ABSENT and not any(hooks)

    def parameters(module: Module) -> tuple[Any, Any]:
        held = read(module.__dict__, "_parameters")
        return read(held, "weight"), read(held, "bias")

    d = layer.__dict__
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
    return State(weight, bias, A, B, tuple(scales), tuple(adapters), backward_hooks, b"")


def _has_backward_hooks(module: Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)
