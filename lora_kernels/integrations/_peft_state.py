"""What a PEFT LoRA layer was found to be, kept while it stays so.

Finding it out takes some hundred reads, and it must cost a few microseconds with the layer's objects in no cache. So
each dictionary entry and type that was read is noted beside the result, and the next call holds these facts against the
layer as it is then, in one compiled loop. Hooks have many places: that none was made since is seen by the number of the
last one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from torch.utils.hooks import RemovableHandle

from ..ops._dispatch import ABSENT, lines_of, unchanged

STATES = "_lora_kernels_states"  # where a layer keeps its states
MOST = 4  # states a layer keeps; each is some kilobytes


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


class _States(dict):
    """The states of one layer by wanted adapters; a copy or a pickle of the layer starts without."""

    owner: dict | None = None

    def __reduce__(self) -> Any:
        return _States, ()


def recall(d: dict, wanted: tuple[str, ...]) -> State | None:
    """The state of the layer whose ``__dict__`` this is, looked up anew if anything read of it has changed."""
    states = d.get(STATES)
    if states is not None and states.owner is d:
        known = states.get(wanted)
        if (
            known is not None
            and known.hooks_made == RemovableHandle.next_id
            and unchanged(known.facts, known.state.lines)
        ):
            return known.state
    facts: list[Any] = []
    state = look(d, wanted, facts)
    if state is not None:
        if states is None or states.owner is not d:
            states = d[STATES] = _States()
            states.owner = d
        elif len(states) >= MOST and wanted not in states:
            del states[next(iter(states))]
        state = state._replace(lines=lines_of([state.weight, *state.A, *state.B]))
        states[wanted] = _Known(state, tuple(facts), RemovableHandle.next_id)
    return state


def look(d: dict, wanted: tuple[str, ...], facts: list[Any]) -> State | None:
    """The state of the layer whose ``__dict__`` this is, None where PEFT's forward must run; fills in its facts."""

    def read(holder: dict, key: str) -> Any:
        value = holder.get(key, ABSENT)
        facts.extend((holder, key, value))
        return value

    def is_plain(module: Module, *kinds: type) -> bool:
        kind = type(module)
        facts.extend((module, None, kind))
        return kind in kinds and read(module.__dict__, "forward") is ABSENT

    if read(d, "_disable_adapters") or not read(d, "cast_input_dtype_enabled"):
        return None
    modules = read(d, "_modules")
    base = read(modules, "base_layer")
    if not is_plain(base, Linear) or altered(base.__dict__):
        return None
    weight, bias = read(base._parameters, "weight"), read(base._parameters, "bias")
    if type(weight) is not Parameter:
        return None
    lora_A, lora_B, dropouts = (read(modules, key)._modules for key in ("lora_A", "lora_B", "lora_dropout"))
    variants, scaling = read(d, "lora_variant"), read(d, "scaling")
    A, B, scales, adapters, backward_hooks = [], [], [], [], False
    for name in wanted:
        a = read(lora_A, name)
        if a is ABSENT:
            continue
        b, dropout, scale = read(lora_B, name), read(dropouts, name), read(scaling, name)
        trio = (a, b, dropout)
        if (
            read(variants, name) is not ABSENT
            or not is_plain(a, Linear)
            or not is_plain(b, Linear)
            or not is_plain(dropout, Identity, Dropout)
            or (type(dropout) is Dropout and read(dropout.__dict__, "training") and read(dropout.__dict__, "p"))
            or type(scale) not in (float, int)
            or any(m._forward_hooks or m._forward_pre_hooks for m in trio)
        ):
            return None
        weights = [read(m._parameters, "weight") for m in (a, b)]
        biases = [read(m._parameters, "bias") for m in (a, b)]
        if any(type(w) is not Parameter for w in weights) or any(v is not None for v in biases):
            return None
        A.append(weights[0])
        B.append(weights[1])
        scales.append(scale)
        adapters.append(name)
        backward_hooks = backward_hooks or any(m._backward_hooks or m._backward_pre_hooks for m in trio)
    if not A:
        return None
    return State(weight, bias, A, B, tuple(scales), tuple(adapters), backward_hooks, b"")


def altered(d: dict) -> Any:
    """Whether calling the module whose ``__dict__`` this is does more than its class's forward."""
    return (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )
