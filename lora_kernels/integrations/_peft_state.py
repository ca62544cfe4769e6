"""What a PEFT LoRA layer was found to be, kept while it stays so.

Finding it out takes some hundred reads, and it must cost a microsecond or two with the layer's objects in no cache. So
each dictionary entry and type that was read is noted beside the result, and the compiled extension holds these facts
against the layer as it is at the next call, in one loop (``csrc/python/layers.h``). A hook that is registered moves a
counter, which is held against what it was. What is kept belongs to the entry ``_lora_kernels_states`` of the layer's
``__dict__``, which :func:`forget` takes away.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import variants as _variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from torch.nn.modules import module as _globals
from torch.utils.hooks import RemovableHandle

from ..ops._dispatch import extension, forced_backend
from ._peft_batch import plain_tensors
from ._peft_packed import Packed, forget_packed, kind_of, packed

ABSENT = ...  # the value of a fact where the dictionary lacks the key
ITEMS = ...  # the key of a fact about a list's items, or about an empty dictionary

#: Hooks of every module, empty while a patched layer runs fast.
GLOBAL_HOOKS = (
    _globals._global_forward_hooks,
    _globals._global_forward_pre_hooks,
    _globals._global_backward_hooks,
    _globals._global_backward_pre_hooks,
)

#: PEFT's variant whose forward is LoRA's, and the one that has a diagonal between A and B; older versions lack them.
MICA = getattr(_variants, "MiCALinearVariant", None)
KASA = getattr(_variants, "KasaLinearVariant", None)

Wanted = tuple[str, ...] | None  # the adapters of a mixed batch; None: the layer's active ones


class State(NamedTuple):
    """A layer that can run fast: ``adapters`` are those of the wanted ones that it has, the rest in their order."""

    weight: Tensor | None  # [N, K], None where the base layer's own forward must run
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    scales: tuple[float, ...]
    adapters: tuple[str, ...]
    backward_hooks: bool
    dropouts: tuple[float, ...]  # the probabilities in force
    biases: tuple[Tensor | None, ...]  # of lora_B
    magnitude: Tensor | None  # of DoRA
    norms: list[Any]  # what ‖W‖² was computed of, and ‖W‖²
    cores: tuple[Tensor | None, ...]  # [R], the diagonal of KaSA; () where there is none
    bare: bool  # an adapter is its factors and its scale, and no more
    packed: Packed | None  # the base where it is quantised; there may then be no adapter


def unusual() -> Any:
    """Whether something is on in this thread that a call of PEFT's modules would see and the kernels would not."""
    return any(GLOBAL_HOOKS) or forward_ad._current_level >= 0


def recall(layer: Module, wanted: Wanted) -> State | None:
    """The state of the layer, looked up anew if anything read of it has changed; None where PEFT's forward must run."""
    if extension is None:
        return None if unusual() else look(layer, wanted, [])
    state = extension.recall(layer, wanted)
    if state is None:
        if unusual():
            return None
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
    if state.weight is None or len(state.adapters) != (1 if wanted is None else len(wanted)) or not state.bare:
        return None
    scale, scaling = split(state.scales, state.weight.device)
    return state.weight, state.bias, state.A, state.B, scaling, scale


def forget(layer: Module) -> None:
    """Let go of all states of the layer."""
    forget_packed(layer)
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

    def read(holder: dict, key: str, to: list[Any] = facts) -> Any:
        value = holder.get(key, ABSENT)
        to.extend((holder, key, value))
        return value

    def is_plain(module: Module, *kinds: type, to: list[Any] = facts) -> bool:
        kind, d = type(module), module.__dict__
        to.extend((module, None, kind))
        hooks = [read(d, key, to) for key in ("_forward_hooks", "_forward_pre_hooks")]
        for held in hooks:
            to.extend((held, ITEMS, ()))
        return kind in kinds and read(d, "forward", to) is ABSENT and not any(hooks)

    def parameters(module: Module, to: list[Any] = facts) -> tuple[Any, Any]:
        held = read(module.__dict__, "_parameters", to)
        return read(held, "weight", to), read(held, "bias", to)

    def items(held: Any) -> tuple | None:
        if type(held) is not list:
            return None
        found = tuple(held)
        facts.extend((held, ITEMS, found))
        return found

    def base_parameters(base: Module) -> tuple[Tensor | None, Tensor | None]:
        """The base layer's as of a torch.nn.Linear, None where its own forward must run."""
        seen: list[Any] = []
        if not is_plain(base, Linear, *conv1d(base), to=seen) or _has_backward_hooks(base):
            return None, None
        weight, bias = parameters(base, seen)
        if type(weight) is not Parameter or weight.dim() != 2 or not weight.numel():
            return None, None
        facts.extend(seen)
        if type(base) is Linear:
            return weight, bias
        if weight.requires_grad:
            return None, bias
        with contextlib.nullcontext() if is_compiling() else plain_tensors():
            return weight.detach().mT, bias

    def quantised(base: Module) -> Packed | None:
        """The base layer's weight where the kernels may take it, None where the layer's own forward must run."""
        seen: list[Any] = []
        if is_compiling() or kind_of(base) is None or not is_plain(base, type(base), to=seen):
            return None
        if _has_backward_hooks(base):
            return None
        facts.extend(seen)
        return packed(layer, base)

    d = layer.__dict__
    merged, disabled = items(read(d, "merged_adapters")) != (), read(d, "_disable_adapters")
    mixed = wanted is not None
    if wanted is None:
        active = read(d, "_active_adapter")
        wanted = (active,) if type(active) is str else items(active)
        if wanted is None:
            return None
    if not read(d, "cast_input_dtype_enabled"):
        return None
    modules = read(d, "_modules")
    base = read(modules, "base_layer")
    weight, bias = base_parameters(base)
    of_base = None if weight is not None else quantised(base)
    if merged or disabled:
        if of_base is None or mixed or (merged and disabled):
            return None
        wanted = ()
    members = [read(modules, key) for key in ("lora_A", "lora_B", "lora_dropout")]
    if ABSENT in members:
        return None
    lora_A, lora_B, dropouts = (read(module.__dict__, "_modules") for module in members)
    variants, scaling = read(d, "lora_variant"), read(d, "scaling")
    A: list[Tensor] = []
    B: list[Tensor] = []
    scales, adapters, probabilities, biases, magnitude, backward_hooks = [], [], [], [], None, False
    cores: list[Tensor | None] = []
    for name in wanted:
        a = read(lora_A, name)
        if a is ABSENT:
            continue
        b, dropout, scale, variant = (read(of, name) for of in (lora_B, dropouts, scaling, variants))
        if (
            not is_plain(a, Linear)
            or not is_plain(b, Linear)
            or not is_plain(dropout, Identity, Dropout)
            or type(scale) not in (float, int)
        ):
            return None
        (a_weight, a_bias), (b_weight, b_bias) = parameters(a), parameters(b)
        if type(a_weight) is not Parameter or type(b_weight) is not Parameter or a_bias is not None:
            return None
        p = 0.0
        if type(dropout) is Dropout:
            p = float(read(dropout.__dict__, "training") and read(dropout.__dict__, "p"))
        core = None
        if MICA is not None and type(variant) is MICA:
            variant = ABSENT
        if variant is not ABSENT and mixed:
            return None
        if KASA is not None and type(variant) is KASA:
            held = read(read(modules, "lora_diag").__dict__, "_parameters")
            core = read(held, name)
            if type(core) is not Parameter or name in read(d, "_lora_kasa_truncation_deferred"):
                return None
        elif variant is not ABSENT:
            if type(variant) is not DoraLinearVariant or len(wanted) > 1 or weight is None:
                return None
            held = read(read(modules, "lora_magnitude_vector").__dict__, "_modules")
            vector = read(held, name)
            if not is_plain(vector, DoraLinearLayer) or b_bias is not None:
                return None
            magnitude = parameters(vector)[0]
            if type(magnitude) is not Parameter or _has_backward_hooks(vector):
                return None
            p = p if read(d, "training") else 0.0
        A.append(a_weight)
        B.append(b_weight)
        scales.append(scale)
        adapters.append(name)
        probabilities.append(p)
        biases.append(b_bias)
        cores.append(core)
        backward_hooks = backward_hooks or any(map(_has_backward_hooks, (a, b, dropout)))
    if not A and of_base is None:
        return None
    if mixed and (len(set(probabilities)) > 1 or any(b is not None for b in biases)):
        return None
    if not any(core is not None for core in cores):
        cores = []
    bare = magnitude is None and not (cores or any(probabilities) or any(b is not None for b in biases))
    return State(
        weight, bias, A, B, tuple(scales), tuple(adapters), backward_hooks,
        tuple(probabilities), tuple(biases), magnitude, [], tuple(cores), bare, of_base,
    )  # fmt: skip


def conv1d(base: Module) -> tuple[type, ...]:
    """The class of transformers' Conv1D, whose weight is [K, N], if ``base`` is of it."""
    cls = type(base)
    return (cls,) if cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D" else ()


def _has_backward_hooks(module: Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)
