"""A quantised base layer under a patched PEFT layer, as the kernels take it.

bitsandbytes' numbers are read where they lie, so a layer has them once; GPTQ's and AWQ's are laid out anew, beside the
layer's own, at half a byte each. What was made of a layer is kept outside its ``__dict__``, and made anew when the
tensors it was made of, their memory or their numbers are others than before.

bitsandbytes' 8-bit layer rounds x to 8 bits in eval mode (LLM.int8(), outliers apart), and its 4-bit layer rounds the
statistics to bf16 on CPUs with AVX512-BF16; here neither is rounded, so results are nearer to the exact ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..ops._dispatch import forced_backend
from ..ops._quantized import quantized_linear as op
from ..quantization.weight import QuantizedWeight
from ..select import choose

_on_cpu, _on_gpu = "cpu" in op.backends(), op.has_gpu_kernel()


class Found(NamedTuple):
    """How a weight is read, and all tensors and objects it is read from."""

    read: Callable[[], QuantizedWeight]
    rests_on: tuple[Any, ...]


class Kind(NamedTuple):
    """A class of base layers.

    Attributes:
        find: its weight, or why there is none that the kernels take.
        dtypes: of a base, its x and autocast's dtype or None: (what it computes in, what it returns).
    """

    find: Callable[[Any], Found | str]
    dtypes: Callable[[Any, Tensor, torch.dtype | None], tuple[torch.dtype, torch.dtype]]


class Packed:
    """The weight of a quantised base layer, shared with it."""

    def __init__(self, base: Any, kind: Kind):
        self.base, self.kind = base, kind
        self._key: tuple[int, ...] = ()
        self._rests_on: tuple[Any, ...] = ()
        self._weight: QuantizedWeight | None = None

    def weight(self) -> QuantizedWeight | None:
        """As it is now; None where the base layer's own forward must run."""
        if missing_kernel(_device(self.base)) is not None:
            return None
        found = self.kind.find(self.base)
        if isinstance(found, str):
            return None
        key = tuple(map(_trace, found.rests_on))
        if self._weight is None or key != self._key:
            self._weight = found.read()
            self._key, self._rests_on = key, found.rests_on  # held, so that no other object gets their place
        return self._weight

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The base layer's, for x of a dtype; the layer's own forward would leave it in that dtype."""
        bias = self.base.bias
        return bias if bias is None or bias.dtype in (dtype, torch.float32) else bias.float()


_packed: WeakKeyDictionary[Module, Packed] = WeakKeyDictionary()


def packed(layer: Module, base: Module) -> Packed:
    """Of a patched layer over a base layer of a known kind, made once."""
    kept = _packed.get(layer)
    if kept is None or kept.base is not base:
        kept = _packed[layer] = Packed(base, kind_of(base))  # type: ignore[arg-type]
    return kept


def forget_packed(layer: Module) -> None:
    """Let go of what was made of a layer's base."""
    _packed.pop(layer, None)


def kind_of(base: Any) -> Kind | None:
    """The kind of a base layer by its class, None where it is none of these."""
    cls = type(base)
    if cls.__module__ == "bitsandbytes.nn.modules":
        return _BITSANDBYTES.get(cls.__name__)
    name = getattr(cls, "QUANT_TYPE", None)
    return _GPTQMODEL.get(name) if isinstance(name, str) else None


def packed_reason(base: Any) -> str | None:
    """Why a base layer of a known kind, without hooks, runs by its own forward; None where it is in one product."""
    found = kind_of(base).find(base)  # type: ignore[union-attr]
    return found if isinstance(found, str) else missing_kernel(_device(base))


def missing_kernel(device: str) -> str | None:
    """Why ``quantized`` would run slowly on a device, None where it has a kernel or one is forced."""
    if (forced := forced_backend()) is not None:
        choice = choose(device, op.backends(), forced)
        return choice.reason if choice.backend is None else None
    return (
        None if (_on_cpu if device == "cpu" else _on_gpu and device == "cuda") else f"no {device} kernel of quantized"
    )


def restore(base: Any) -> None:
    """Turn a 4-bit layer that bitsandbytes repacked for the CPU back, in place, as it does itself before it is saved.

    Its inverse leaves statistics that are not nested in the repacked order; they are put right.
    """
    weight = base._parameters.get("weight")
    state: Any = getattr(weight, "quant_state", None)
    if kind_of(base) is not _FOUR_BITS or getattr(state, "packing_format_for_cpu", None) is None or weight.is_meta:
        return
    if state.packing_format_for_cpu:
        inverse = importlib.import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
        weight.data, weight.quant_state = inverse(weight.data, state)
        state = weight.quant_state
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.T.flatten().float()


def _device(base: Any) -> str:
    return (base.weight if "weight" in base._parameters else base.qweight).device.type


def _trace(of: Any) -> Any:
    """What changes when a tensor's memory or numbers do, or when it is another object."""
    if not isinstance(of, Tensor):
        return id(of)
    return of.data_ptr(), 0 if of.is_inference() else of._version


def _is_one(weight: Any, name: str) -> bool:
    """Whether a weight is bitsandbytes' parameter of that name, or what pickle makes of it."""
    return type(weight) is Parameter or type(weight).__name__ == name


def _four_bits(base: Any) -> Found | str:
    weight = base._parameters.get("weight")
    if not _is_one(weight, "Params4bit") or getattr(weight, "quant_state", None) is None or weight.is_meta:
        return NOT_QUANTISED
    restore(base)
    state = weight.quant_state
    N, K = base.out_features, base.in_features
    if tuple(state.shape) != (N, K) or weight.nbytes != (N * K + 1) // 2:
        return f"base weight is {list(weight.shape)} here, of {list(state.shape)}"
    nested = (state.state2, state.state2.absmax, state.offset) if state.nested else ()
    return Found(lambda: QuantizedWeight.from_bitsandbytes(weight), (weight, state, state.absmax, *nested))


def _eight_bits(base: Any) -> Found | str:
    weight, state = base._parameters.get("weight"), base.state
    if not _is_one(weight, "Int8Params") or not hasattr(weight, "CB") or state.has_fp16_weights:
        return NOT_QUANTISED
    CB, SCB = (state.CB, state.SCB) if weight.CB is None else (weight.CB, weight.SCB)  # as its forward takes them
    if CB is None or SCB is None or CB.dtype is not torch.int8 or CB.is_meta:
        return NOT_QUANTISED
    if tuple(CB.shape) != (base.out_features, base.in_features):
        return f"base weight is {list(CB.shape)} here"
    return Found(lambda: QuantizedWeight.from_bitsandbytes(CB, SCB), (CB, SCB))


def _gptq(base: Any) -> Found | str:
    tensors: tuple[Any, ...] = tuple(getattr(base, name, None) for name in ("qweight", "qzeros", "scales", "g_idx"))
    if (reason := _gptqmodel_reason(base, tensors)) is not None:
        return reason
    layout = "gptq" if base.qzero_format() == 1 else "gptq_v2"
    return Found(lambda: QuantizedWeight.from_gptq(*tensors, checkpoint_format=layout), (*tensors, layout))


def _awq(base: Any) -> Found | str:
    tensors: tuple[Any, ...] = tuple(getattr(base, name, None) for name in ("qweight", "qzeros", "scales"))
    if (reason := _gptqmodel_reason(base, tensors)) is not None:
        return reason
    return Found(lambda: QuantizedWeight.from_awq(*tensors), tensors)


def _gptqmodel_reason(base: Any, tensors: tuple[Any, ...]) -> str | None:
    if not all(isinstance(t, Tensor) and t.numel() and not t.is_meta for t in tensors):
        return NOT_QUANTISED
    if base.bits != 4 or tensors[0].dtype is not torch.int32:
        return f"base layer has {base.bits} bits in {tensors[0].dtype}"
    return None if getattr(base, "adapter", None) is None else "base layer has an adapter of its own"


def _four_bits_dtypes(base: Any, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    if not base.compute_type_is_set:  # by the first x, as in the layer's own forward
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return base.compute_dtype or x.dtype, x.dtype


def _eight_bits_dtypes(base: Any, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    own = autocast is not None and base.training and not x.is_cuda  # there it is torch's product of the whole weight
    dtype = autocast if own else x.dtype
    return dtype, dtype  # type: ignore[return-value]


def _gptq_dtypes(base: Any, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    return autocast or x.dtype, x.dtype


def _awq_dtypes(base: Any, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    return autocast or (torch.float16 if x.dtype is torch.float32 else x.dtype), x.dtype


NOT_QUANTISED = "base layer is not quantised yet"
_FOUR_BITS = Kind(_four_bits, _four_bits_dtypes)
_BITSANDBYTES = {
    **dict.fromkeys(("Linear4bit", "LinearNF4", "LinearFP4"), _FOUR_BITS),
    "Linear8bitLt": Kind(_eight_bits, _eight_bits_dtypes),
}
#: GPTQModel's layers by what they call themselves: those that leave the checkpoint's tensors as they are.
_GPTQMODEL = {
    **dict.fromkeys(("torch", "tritonv2"), Kind(_gptq, _gptq_dtypes)),
    "awq_torch": Kind(_awq, _awq_dtypes),
}
