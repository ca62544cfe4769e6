"""PEFT's tuners whose ΔW is a transform of a sparse spectrum, in ``spectral_linear``'s arguments.

A plan is made of the places that PEFT drew and keeps on the layer, and found again by that tensor for as long as it
lives and stays as it is. Layers whose places are the same, as those of one shape and seed, share a plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.spectral import Kind
from ..spectral_plan import SpectralPlan
from ._peft_batch import plain_tensors
from ._peft_relatives import peft_class


class Spectrum(NamedTuple):
    """One adapter of a layer, as :func:`lora_kernels.spectral_linear` takes it."""

    values: Tensor
    plan: SpectralPlan
    kind: Kind
    scale: float


class Tuner(NamedTuple):
    """A tuner's layer class.

    Attributes:
        tuner: its name, for people.
        formula: what it adds to the base layer's output, for people.
        module, cls: where PEFT has the class; older versions lack some.
        values, places, scaling: the attributes with the adapters' values [n], places int64 [2, n] and scales.
        kind: of a layer and an adapter, the transform and None, or None and why PEFT's own must run.
    """

    tuner: str
    formula: str
    module: str
    cls: str
    values: str
    places: str
    scaling: str
    kind: Callable[[Any, str], tuple[Kind | None, str | None]]


def _wavelet(layer: Any, name: str) -> tuple[Kind | None, str | None]:
    if not layer.waveft_use_idwt[name]:
        return "identity", None
    family = layer.waveft_wavelet_family[name]
    return ("haar", None) if family == "db1" else (None, f"its wavelet is {family}, not db1")


#: In the order of the README's table.
TUNERS = (
    Tuner(
        "FourierFT", "s · Re(ifft2(S)) x", "fourierft", "FourierFTLinear",
        "fourierft_spectrum", "indices", "fourierft_scaling", lambda layer, name: ("fourier", None),
    ),
    Tuner(
        "WaveFT", "s · idwt2(S) x", "waveft", "WaveFTLinear",
        "waveft_spectrum", "waveft_indices", "waveft_scaling", _wavelet,
    ),
)  # fmt: skip

CLASSES = {cls: tuner for tuner in TUNERS if (cls := peft_class(tuner.module, tuner.cls)) is not None}


def tuner_of(cls: type) -> Tuner | None:
    """The tuner whose layers are of this class, or of one that derives from it."""
    return next((CLASSES[base] for base in cls.__mro__ if base in CLASSES), None)


def spectrum_of(layer: Any, tuner: Tuner, name: str) -> Spectrum | str:
    """An adapter of a layer, or why PEFT's own computation must run."""
    values, scale = getattr(layer, tuner.values)[name], getattr(layer, tuner.scaling).get(name)
    if type(values) not in (Tensor, Parameter):
        return f"its spectrum is {type(values).__qualname__}"
    if type(scale) not in (float, int):
        return f"scaling is a {type(scale).__qualname__}"
    kind, reason = tuner.kind(layer, name)
    if kind is None:
        return str(reason)
    shared = _shared_by(getattr(layer, tuner.places).get(name), (layer.out_features, layer.in_features))
    if isinstance(shared, str):
        return shared
    if values.shape != (shared.count,):
        return f"its spectrum is {list(values.shape)} here (a shard, or not gathered)"
    return Spectrum(values, shared.on(values.device), kind, float(scale))


class _Shared:
    """The plan of some places, on each device that asked for it."""

    def __init__(self, plan: SpectralPlan):
        self.count, self._plans = plan.n, {plan.device: plan}

    def on(self, device: torch.device) -> SpectralPlan:
        if device not in self._plans:
            self._plans[device] = next(iter(self._plans.values())).to(device)
        return self._plans[device]


_by_tensor = WeakTensorKeyDictionary()  # places -> (what they were, what is made of them)
_by_content: WeakValueDictionary[Any, _Shared] = WeakValueDictionary()


def _shared_by(places: Any, shape: tuple[int, int]) -> _Shared | str:
    """What all layers share that have these places, or why they can't be used."""
    if type(places) is not Tensor or places.is_inference() or places.is_meta:
        return "its places are no plain tensor"
    facts = shape, places._version, places.data_ptr(), places.shape, places.device
    known = _by_tensor.get(places)
    if known is None or known[0] != facts:
        known = facts, _made(places, shape)
        _by_tensor[places] = known
    return known[1]


def _made(places: Tensor, shape: tuple[int, int]) -> _Shared | str:
    if places.dtype is not torch.int64 or places.dim() != 2 or places.shape[0] != 2:
        return f"its places are {str(places.dtype).removeprefix('torch.')} {list(places.shape)}, not int64 [2, n]"
    with plain_tensors():
        rows, columns = places = places.cpu().clone(memory_format=torch.contiguous_format)
        key = shape, hashlib.sha256(places.numpy().tobytes()).digest()
        if (shared := _by_content.get(key)) is not None:
            return shared
        try:
            plan = SpectralPlan(rows, columns, shape=shape)
        except IndexError as error:  # PEFT counts from the other end, or says so itself
            return f"its places: {error}"
        if (rows * shape[1] + columns).unique().shape[0] < plan.n:
            return "two of its places are the same"  # of which PEFT takes one
    return _by_content.setdefault(key, _Shared(plan))
