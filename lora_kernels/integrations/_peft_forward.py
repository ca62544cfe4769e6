"""What a patched PEFT LoRA layer computes: y = base(x) + Σᵢ sᵢ (x̃ᵢ Aᵢᵀ) Bᵢᵀ, KaSA, DoRA, or a mixed batch.

Whatever could change the result in silence (hooks, a variant, another class of module or parameter) is looked at; what
the kernels refuse before they write anything (shapes, dtypes, devices) is left to them, and the call then goes to PEFT.
A base layer quantised to 4 or 8 bits is in the same sum; one that is otherwise not plainly torch's product runs by its
own forward, and the adapters' part is added to what it returns. :func:`._peft_reason.slow_reason` says the same in
words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Linear
from torch.nn.functional import linear

from ..ops import _check
from ..ops._dispatch import extension_error, forced_backend
from ..ops._low_rank import lora_add_, lora_shrink
from ..ops._quantized import quantized_linear as _product
from ..ops.lora_linear import _Dropout, apply_lora, dora, draw_seed, lora, row_norms_sq
from ..ops.low_rank import _call, _multi_lora
from ..ops.quantized import quantized_linear, quantized_lora_linear
from ..quantization.weight import QuantizedWeight
from ..reference.dropout import keep_scale, threshold
from ._peft_batch import Names
from ._peft_state import State, look, recall, split, unusual

autocast = torch._C._is_any_autocast_enabled
_compiled, _on_gpu = extension_error is None, lora_add_.has_gpu_kernel()
_add, _native = lora_add_.overload, lora_add_.native

_in_graphs: list[Tensor] = []  # plans and scales that a captured graph reads, which no cache may let go of


def forward(layer: Any, x: Tensor, names: Any) -> Tensor | None:
    """The layer's output, or None, with nothing done, where PEFT's own forward must run."""
    compiling = is_compiling()
    if type(x) is not Tensor or x.dtype is torch.float64 or (compiling and unusual()):
        return None
    forced = None if compiling else forced_backend()
    if forced is None and not (_compiled if x.is_cpu else _on_gpu and x.is_cuda):
        return None

    wanted, table = None, None
    if names is not None:
        if compiling:
            return None
        shape = x.shape
        if len(shape) < 2 or not shape[-1] or len(names) != shape[0]:
            return None
        if type(names) is not Names:
            names = Names(names)
        rows = x.numel() // shape[-1]
        wanted, table = names.routing(rows, x)
    state = look(layer, wanted, []) if compiling else recall(layer, wanted)
    if state is None:
        return None
    if wanted and table is not None and len(state.adapters) != len(wanted):  # this layer lacks some of the batch's
        table = names.among(state.adapters).routing(rows, x)[1]
    grad = torch.is_grad_enabled() and (x.requires_grad or _any_requires_grad(state))
    if grad and state.backward_hooks:
        now = look(layer, wanted, [])  # they may be gone
        if now is None or now.backward_hooks:
            return None
    if grad and state.weight is not None and state.weight.requires_grad:
        if state.magnitude is not None:
            return None
        state = state._replace(weight=None)
    if state.cores:
        state = _with_cores(state)
    if state.packed is not None and not compiling:
        quantised = state.packed.weight()
        if quantised is not None:
            return _over_quantised(state, quantised, x, table, grad)
        if not state.A:
            return None
    if compiling:
        state = _scaled(state)
    if not autocast():
        return _output(layer, state, x, table, grad)

    device = x.device.type
    if compiling or not x.is_floating_point():
        return None
    if not torch.is_autocast_enabled(device):
        return _output(layer, state, x, table, grad)
    dtype = torch.get_autocast_dtype(device)
    if not fits(state.A, dtype):
        return None
    if state.weight is None:
        return _beside(layer, state, x, table, grad, dtype)
    bias = None if state.bias is None else state.bias.to(dtype)
    state = state._replace(weight=state.weight.to(dtype), bias=bias, norms=[])
    with torch.autocast(device, enabled=False):
        return _output(layer, state, x.to(dtype), table, grad)


def _with_cores(state: State) -> State:
    """The same with each core inside B."""
    pairs = zip(state.B, state.cores, strict=True)
    B = [b.float() if core is None else b.float() * core.float() for b, core in pairs]
    bare = not any(state.dropouts) and all(b is None for b in state.biases)
    return state._replace(A=[a.float() for a in state.A], B=B, cores=(), bare=bare)


def _scaled(state: State) -> State:
    """The same with each scale inside B: a graph takes a changed one, as a tensor's, without being made again."""
    B = [b.float() * s for b, s in zip(state.B, state.scales, strict=True)]
    biases = tuple(None if b is None else b.float() * s for b, s in zip(state.biases, state.scales, strict=True))
    ones = (1.0,) * len(B)
    return state._replace(A=[a.float() for a in state.A], B=B, scales=ones, biases=biases)


def fits(factors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether all are of one dtype that goes with x's."""
    first = factors[0].dtype
    return first in (dtype, torch.float32) and all(t.dtype is first for t in factors)


def _any_requires_grad(state: State) -> bool:
    tensors = (state.weight, state.bias, state.magnitude, *state.A, *state.B, *state.biases, *state.cores)
    return state.weight is None or any(t is not None and t.requires_grad for t in tensors)


def _output(layer: Any, state: State, x: Tensor, table: Tensor | None, grad: bool) -> Tensor | None:
    if state.weight is None:
        return _beside(layer, state, x, table, grad, x.dtype)
    if state.magnitude is not None:
        return _dora(state, x) if x.dim() > 1 else None  # of a vector PEFT makes [1, N]
    if table is not None or (state.bare and not grad):
        return _added(state, x, linear(x, state.weight, state.bias), table, grad)
    if state.bare:
        A, B, scale = _concatenated(state)
        return apply_lora(x, state.weight, state.bias, None, scale, A[0], B[0], None, 0.0, None)
    return _one_by_one(state, x, None)


def _beside(layer: Any, state: State, x: Tensor, table: Tensor | None, grad: bool, dtype: torch.dtype) -> Tensor | None:
    """The adapters' part in ``dtype``, added to what the base layer's own forward returns."""
    if not fits(state.A, dtype):
        return None
    base = layer.base_layer
    y = base(x)
    result = y.dtype
    if type(y) is not Tensor or y.device != x.device or not y.is_floating_point() or y.shape[:-1] != x.shape[:-1]:
        name = type(base).__name__
        raise TypeError(f"the base layer {name} made {type(y).__name__} {list(y.shape)} of {list(x.shape)}")
    if result in (dtype, torch.float32) and not _is_new(base):
        y = y.clone()
    with torch.autocast(x.device.type, enabled=False) if autocast() else contextlib.nullcontext():
        return _onto(state, x.to(dtype), y, table, grad).to(result)


def _onto(state: State, x: Tensor, y: Tensor, table: Tensor | None, grad: bool) -> Tensor:
    """y, which is overwritten, plus the adapters' part in x's dtype; in fp32 where y is in neither."""
    if y.dtype not in (x.dtype, torch.float32):
        y = y.float()
    one_by_one = table is None and not state.bare
    return _one_by_one(state, x, y) if one_by_one else _added(state, x, y, table, grad)


def _over_quantised(
    state: State, weight: QuantizedWeight, x: Tensor, table: Tensor | None, grad: bool
) -> Tensor | None:
    """Over a quantised base: in one sum where it computes in the adapters' dtype, else added to its product in fp32."""
    device, base = x.device.type, state.packed
    on = autocast() and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if on else x.dtype
    if x.dtype not in _check.FLOATS:
        return None
    inner, result = base.kind.dtypes(base.base, x, dtype if on else None)  # type: ignore[union-attr]
    if inner not in _check.FLOATS or (state.A and not fits(state.A, dtype)):
        return None
    bias = base.bias(inner)  # type: ignore[union-attr]
    with torch.autocast(device, enabled=False) if on else contextlib.nullcontext():
        if not state.A:
            return quantized_linear(x.to(inner), weight, bias).to(result)
        result = torch.promote_types(result, dtype)
        if inner is dtype:
            return _in_one_sum(state, weight, bias, x.to(dtype), table, grad).to(result)
        y = quantized_linear(x.to(inner), weight, bias)
        return _onto(state, x.to(dtype), y, table, grad).to(result)


def _in_one_sum(
    state: State, weight: QuantizedWeight, bias: Tensor | None, x: Tensor, table: Tensor | None, grad: bool
) -> Tensor:
    A, B, scale, p = state.A, state.B, state.scales[0], state.dropouts[0]
    if table is not None and not (grad or threshold(p)):
        scale, scaling = split(state.scales, x.device)
        v = lora_shrink(x, A, None, None, table, None, x.shape[:-1].numel())
        x = x if weight.order is None else x.index_select(-1, weight.order)
        return _product(x, *weight.packed, bias, v, B, None, None, table, scaling, None, None, scale)
    if table is None and state.bare and sum(a.shape[0] for a in A) <= _check.MAX_RANK:
        A, B, scale = _concatenated(state)
        return quantized_lora_linear(x, weight, A[0], B[0], scaling=scale, bias=bias)
    if table is None and len(A) == 1 and state.biases[0] is None:
        return quantized_lora_linear(x, weight, A[0], B[0], scaling=scale, bias=bias, dropout=p, training=True)
    return _onto(state, x, quantized_linear(x, weight, bias), table, grad)


def _is_new(base: Any) -> bool:
    """Whether nobody else holds what the base layer returns."""
    kind, d = type(base), base.__dict__
    made = kind is Linear or kind.__module__.startswith("bitsandbytes")
    return made and "forward" not in d and not d["_forward_hooks"]


def _one_by_one(state: State, x: Tensor, y: Tensor | None) -> Tensor:
    """Each adapter with its own dropout and bias, onto y or onto the base layer's product."""
    weight, bias = state.weight, state.bias
    parts = zip(state.A, state.B, state.scales, state.dropouts, state.biases, strict=True)
    for A, B, scale, p, of_B in parts:
        seed = draw_seed(x) if threshold(p) else None
        delta_bias = None if of_B is None else of_B.float() * scale
        y = lora(x, weight, bias, y, scale, A, B, seed, p, delta_bias)
        weight = bias = None
    return y  # type: ignore[return-value]


def _dora(state: State, x: Tensor) -> Tensor:
    weight, A, B, scale, p = state.weight, state.A[0], state.B[0], state.scales[0], state.dropouts[0]
    norms = None
    if not is_compiling():
        key = weight.data_ptr(), weight._version  # type: ignore[union-attr]
        if not state.norms or state.norms[0] != key:
            state.norms[:] = key, row_norms_sq(weight)  # type: ignore[arg-type]
        norms = state.norms[1]
    seed = draw_seed(x) if threshold(p) else None
    return dora(x, weight, state.bias, scale, A, B, state.magnitude, norms, seed, p)  # type: ignore[arg-type]


def _added(state: State, x: Tensor, y: Tensor, table: Tensor | None, grad: bool) -> Tensor:
    """y plus the part of one adapter, of several that all rows have, or of a mixed batch; y is overwritten."""
    scaling = None
    if table is None:
        A, B, scale = _concatenated(state)
    else:
        A, B = state.A, state.B
        scale, scaling = split(state.scales, x.device)
        if threshold(p := state.dropouts[0]):
            x, scale = _Dropout.apply(x, draw_seed(x), p), scale * keep_scale(p)
    compiling = is_compiling()
    if not compiling and x.is_cuda and torch.cuda.is_current_stream_capturing():
        _in_graphs.extend(t for t in (table, scaling) if t is not None)
    if grad and table is None:
        return lora(x, None, None, y, scale, A[0], B[0])
    if grad:
        return _multi_lora(x, A, B, None, table, scaling, None, None, y, scale)
    args = (y, x, A, B, None, None, table, scaling, None, None, scale)
    if (not compiling and forced_backend() is not None) or (x.is_cuda and not compiling):
        _call(lora_add_, _check.add, y, args)
    elif compiling or _native is None or not _native(*args):
        _add(*args)
    return y


def _concatenated(state: State) -> tuple[list[Tensor], list[Tensor], float]:
    """Several adapters of the same rows as one: Σᵢ sᵢ Bᵢ Aᵢ = s [B₁ … Bₙ] [A₁; …; Aₙ], s inside B where they differ."""
    A, B, scales = state.A, state.B, state.scales
    scale = scales[0]
    if len(A) == 1:
        return A, B, scale
    if scales.count(scale) != len(scales):
        A = [a.float() for a in A]
        B = [b.float() * s for b, s in zip(B, scales, strict=True)]
        scale = 1.0
    return [torch.cat(A)], [torch.cat(B, 1)], scale
