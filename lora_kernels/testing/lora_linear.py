"""Samples, oracle and yardstick of the ``lora_linear`` family: a layer with one adapter, forward and backward.

The dropout mask is ``reference.dropout``'s, which tests hold against the generator's published numbers; nothing else is
shared with the package.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.dropout import dropout_mask, keep_scale
from .low_rank import LOW_RANK_DTYPES, Dtypes, _copy_into
from .numerics import Sample, rms

#: Every combination of dtypes the layer takes, by name.
LORA_LINEAR_DTYPES = {name: dtypes for name, dtypes in LOW_RANK_DTYPES.items() if dtypes.x == dtypes.y}

#: The differentiable arguments.
LORA_LINEAR_LEAVES = (
    "x", "A", "B", "bias", "core", "in_scale", "delta_in_scale", "delta_scale", "out_scale", "magnitude",
)  # fmt: skip


class Expected(NamedTuple):
    """What the error rule takes: the float64 truth, plain PyTorch's result and the noise of a float32 sum."""

    oracle: Tensor
    plain: Tensor
    noise: float


@dataclass(frozen=True)
class _Case:
    """A sample before it has a dtype. ``wide`` names arguments that are fp32 whatever x is."""

    name: str
    rows: tuple[int, ...]
    K: int
    N: int
    R: int
    bias: bool = False
    dropout: float = 0.0
    training: bool = True
    core: str | None = None
    scales: tuple[str, ...] = ()
    magnitude: str | None = None
    scaling: float = 0.7
    x: str = "dense"
    weight: str = "dense"
    factors: str = "dense"
    wide: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()


_SCALES = "in_scale", "delta_in_scale", "delta_scale", "out_scale"
_CASES = (
    _Case("no-rows", (0,), 64, 48, 8, bias=True),
    _Case("no-rows-dropout-3d", (0, 5), 64, 48, 8, dropout=0.5),
    _Case("no-rows-dora", (0,), 64, 48, 8, magnitude="near"),
    _Case("vector", (), 96, 300, 8, bias=True),
    _Case("vector-dropout", (), 96, 300, 8, dropout=0.5),
    _Case("vector-dora", (), 96, 300, 8, magnitude="near"),
    _Case("one-row", (1,), 576, 576, 16, bias=True),
    _Case("all-ones", (1,), 1, 1, 1),
    _Case("one-in", (17,), 1, 63, 3, dropout=0.5),
    _Case("one-out", (300,), 63, 1, 3, dropout=0.5),
    _Case("odd", (7,), 7, 63, 3, dropout=0.5, bias=True),
    _Case("m17", (17,), 63, 130, 17, bias=True, dropout=0.05),
    _Case("m65", (65,), 96, 100, 16, dropout=0.5, bias=True, wide=("bias",)),
    _Case("m129", (129,), 100, 72, 16, dropout=0.05),
    _Case("m129-dora", (129,), 100, 72, 16, magnitude="near"),
    _Case("m129-dora-dropout", (129,), 100, 72, 16, magnitude="near", dropout=0.05, bias=True),
    _Case("m300", (300,), 1100, 257, 8, dropout=0.05, bias=True, traits=("large",)),
    _Case("m300-dora", (300,), 257, 600, 8, magnitude="near", bias=True, traits=("large",)),
    _Case("wide", (3,), 2500, 1111, 8, dropout=0.5, traits=("large",)),
    _Case("r1", (33,), 72, 96, 1, dropout=0.5),
    _Case("r100", (17,), 72, 136, 100, dropout=0.05),
    _Case("r512", (9,), 200, 136, 512, dropout=0.5, traits=("large",)),
    _Case("dropout-of-all", (9,), 64, 48, 8, dropout=1.0, bias=True),
    _Case("dropout-of-none", (9,), 64, 48, 8, dropout=0.5, training=False),
    _Case("scaling-of-zero", (9,), 64, 48, 8, scaling=0.0),
    _Case("scaling-below-zero", (9,), 64, 48, 8, scaling=-2.0, dropout=0.5),
    _Case("diagonal-core", (21,), 96, 40, 16, core="diagonal", dropout=0.5),
    _Case("core", (21,), 96, 40, 17, core="full", bias=True),
    _Case("core-wide", (21,), 96, 40, 17, core="full", wide=("core",)),
    *(_Case(name.replace("_", "-"), (21,), 63, 40, 8, scales=(name,), bias=True) for name in _SCALES),
    _Case("every-scale", (21,), 63, 40, 8, scales=_SCALES, core="full", bias=True, dropout=0.5, wide=_SCALES),
    _Case("3d", (3, 11), 64, 48, 8, dropout=0.5, bias=True),
    _Case("3d-dora", (3, 11), 64, 48, 8, magnitude="near", bias=True),
    _Case("4d-blocks", (2, 3, 4), 40, 24, 4, dropout=0.5, x="blocks"),
    _Case("x-columns", (12,), 96, 64, 8, dropout=0.5, x="columns"),
    _Case("x-rows", (12,), 63, 64, 8, dropout=0.5, x="rows"),
    _Case("x-transposed", (35,), 96, 64, 8, dropout=0.5, x="transposed"),
    _Case("x-transposed-dora", (35,), 96, 64, 8, magnitude="near", dropout=0.5, x="transposed"),
    _Case("x-swapped", (5, 4), 63, 48, 8, dropout=0.5, x="swapped"),
    _Case("x-expanded", (10,), 96, 64, 8, dropout=0.5, x="expanded"),
    _Case("weight-transposed", (12,), 63, 64, 8, magnitude="near", weight="transposed"),
    _Case("weight-columns", (12,), 63, 64, 8, magnitude="near", weight="columns", dropout=0.5),
    _Case("factors-transposed", (14,), 63, 72, 9, factors="transposed", dropout=0.5),
    _Case("factors-columns", (14,), 64, 72, 16, factors="columns"),
    _Case("factors-transposed-dora", (14,), 63, 72, 9, factors="transposed", magnitude="near"),
    _Case("dora", (19,), 96, 80, 16, magnitude="near"),
    _Case("dora-bias", (19,), 96, 80, 16, magnitude="near", bias=True),
    _Case("dora-wide", (19,), 96, 80, 16, magnitude="near", bias=True, wide=("bias", "magnitude")),
    _Case("dora-dropout", (19,), 96, 80, 16, magnitude="near", dropout=0.5),
    _Case("dora-dropout-of-all", (19,), 96, 80, 16, magnitude="near", dropout=1.0, bias=True),
    _Case("dora-zero", (19,), 96, 80, 16, magnitude="zero"),
    _Case("dora-zero-dropout", (19,), 96, 80, 16, magnitude="zero", dropout=0.5, bias=True),
    _Case("dora-core", (19,), 63, 80, 9, magnitude="near", core="full", scales=_SCALES[1:3]),
    _Case("dora-core-dropout", (19,), 63, 80, 9, magnitude="near", core="diagonal", scales=_SCALES[1:3], dropout=0.05),
    _Case("dora-r100", (19,), 96, 80, 100, magnitude="near"),
)  # fmt: skip


def lora_linear_samples(x: torch.dtype = torch.float32, factors: torch.dtype | None = None, *_: Any) -> list[Sample]:
    """The samples of ``lora_linear`` in the given dtypes (``*LORA_LINEAR_DTYPES[name]``).

    Each makes every argument of the call but ``weight_norm_sq``. What must not be read is NaN: what lies between the
    rows of a strided x, weight or factor.

    Traits: ``dropout`` and ``dora``; ``strided``; ``few`` (too few outputs for an RMS of rounding errors);
    ``large`` (slow for the oracle).

    Args:
        x: dtype of x and the weight.
        factors: dtype of A, B, core and magnitude; x's where None.
    """
    return _samples(Dtypes(x, factors or x, x))


@functools.cache
def _samples(dtypes: Dtypes) -> list[Sample]:
    samples = []
    for case in _CASES:
        traits = set(case.traits)
        traits |= {"dropout"} if case.dropout and case.training else set()
        traits |= {"dora"} if case.magnitude else set()
        traits |= {"strided"} if {case.x, case.weight, case.factors} != {"dense"} else set()
        traits |= {"few"} if math.prod(case.rows) * min(case.N, case.K) < 256 else set()
        samples.append(Sample(case.name, functools.partial(_make, case, dtypes), frozenset(traits)))
    return samples


def _make(case: _Case, dtypes: Dtypes, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def vector(name: str, *shape: int, about: float = 1.0, spread: float = 0.3) -> Tensor:
        dtype = torch.float32 if name in case.wide else dtypes.factors
        return (about + spread * random(*shape, dtype=torch.float64)).to(dtype)

    K, N, R = case.K, case.N, case.R
    x = random(*case.rows, K, dtype=dtypes.x)
    weight = (random(N, K, dtype=torch.float64) / K**0.5).to(dtypes.x)
    A, B = ((random(*size, dtype=torch.float64) / size[1] ** 0.5).to(dtypes.factors) for size in ((R, K), (N, R)))
    a: dict[str, Any] = {
        "x": _copy_into(x, case.x),
        "weight": _copy_into(weight, case.weight),
        "A": _copy_into(A, case.factors),
        "B": _copy_into(B, case.factors),
        "scaling": case.scaling,
        "bias": None,
        "dropout": case.dropout,
        "training": case.training,
        "seed": 2**40 + 12345,
        "core": None,
        **dict.fromkeys(_SCALES),
        "magnitude": None,
    }
    if case.bias:
        a["bias"] = random(N, dtype=torch.float32 if "bias" in case.wide else dtypes.x)
    if case.core is not None:
        a["core"] = vector("core", *((R,) if case.core == "diagonal" else (R, R)), spread=1 / R**0.5)
    for name in case.scales:
        a[name] = vector(name, N if name in ("delta_scale", "out_scale") else K)
    if case.magnitude is not None:
        a["magnitude"] = vector("magnitude", N, about=1.2, spread=0.1)
        if case.magnitude == "zero":
            a["magnitude"][1] = 0
    return a


def lora_linear_oracle(**a: Any) -> Tensor:
    """``lora_linear`` in float64, differentiable: the truth a sample is held against."""
    return _formula(1, _norm(a), **_wide(a, 1))


def _wide(a: dict[str, Any], power: int) -> dict[str, Any]:
    """The arguments with every tensor in float64 and, like the scaling, raised to a power."""
    wide = {name: t.double() ** power if isinstance(t, Tensor) else t for name, t in a.items()}
    return wide | {"scaling": a["scaling"] ** power}


@torch.no_grad()
def _norm(a: dict[str, Any]) -> Tensor:
    """‖W + s B coreᵀ A‖ of each row with the adapter's scales in it, float64."""
    b = _wide(a, 1)
    A, B = b["A"], b["B"]
    if b["core"] is not None:
        B = B * b["core"] if b["core"].dim() == 1 else B @ b["core"].T
    A = A if b["delta_in_scale"] is None else A * b["delta_in_scale"]
    B = B if b["delta_scale"] is None else B * b["delta_scale"][:, None]
    return (b["weight"] + b["scaling"] * B @ A).norm(dim=1)


def _formula(
    power: int,
    norm: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None,
    dropout: float,
    training: bool,
    seed: int,
    core: Tensor | None,
    in_scale: Tensor | None,
    delta_in_scale: Tensor | None,
    delta_scale: Tensor | None,
    out_scale: Tensor | None,
    magnitude: Tensor | None,
) -> Tensor:
    """The formula of arguments that were raised to ``power``: the sum of its terms each to that power."""
    mask, keep = _mask(x, dropout, training, seed)
    keep **= power
    kept = x * mask * keep
    v = (kept if delta_in_scale is None else kept * delta_in_scale) @ A.T
    if core is not None:
        v = v * core if core.dim() == 1 else v @ core
    delta = scaling * (v @ B.T)
    if delta_scale is not None:
        delta = delta * delta_scale
    base = (x if in_scale is None else x * in_scale) @ weight.T
    if magnitude is not None:
        c = magnitude / norm**power
        if not (training and dropout):
            return _plus(c * (base + delta), bias)
        less = c - 1 if power == 1 else c - c.detach() + (c.detach().sqrt() - 1) ** 2
        return _plus(base, bias) + less * (kept @ weight.T) + c * delta
    base = _plus(base, bias)
    return (base if out_scale is None else base * out_scale) + delta


def _plus(t: Tensor, bias: Tensor | None) -> Tensor:
    return t if bias is None else t + bias


def _mask(x: Tensor, dropout: float, training: bool, seed: int) -> tuple[Tensor | float, float]:
    """What is kept of x, and what it is scaled by."""
    if not training or not dropout:
        return 1.0, 1.0
    rows = x.shape[:-1].numel()
    mask = dropout_mask(torch.tensor([seed]), rows, x.shape[-1], dropout).reshape(x.shape).to(x.dtype)
    return mask.to(x.device), keep_scale(dropout)


def lora_linear_plain(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None,
    dropout: float,
    training: bool,
    seed: int,
    core: Tensor | None,
    in_scale: Tensor | None,
    delta_in_scale: Tensor | None,
    delta_scale: Tensor | None,
    out_scale: Tensor | None,
    magnitude: Tensor | None,
) -> Tensor:
    """``lora_linear`` the way PEFT writes it: fp32 factors over a half-precision x cast x.

    Base products are in x's dtype. In DoRA under dropout PEFT casts the weight too, and makes the second one in the
    factors' dtype.
    """
    mask, keep = _mask(x, dropout, training, seed)
    kept = x.to(A.dtype)
    if training and dropout:
        kept = kept * mask * keep
    v = F.linear(kept if delta_in_scale is None else (kept * delta_in_scale).to(A.dtype), A)
    if core is not None:
        v = (v * core if core.dim() == 1 else v @ core.to(v.dtype)).to(A.dtype)
    delta = F.linear(v, B) * scaling
    if delta_scale is not None:
        delta = delta * delta_scale
    own = None if bias is None else bias.to(x.dtype)
    base = F.linear(x if in_scale is None else (x * in_scale).to(x.dtype), weight, own)
    if magnitude is not None:
        a = {"delta_in_scale": delta_in_scale, "delta_scale": delta_scale, "core": core}
        norm = _norm({"weight": weight, "A": A, "B": B, "scaling": scaling, **a}).to(A.dtype)
        c = magnitude / norm
        if training and dropout:
            again = F.linear((x * mask).to(x.dtype), weight) * keep
        else:
            again = base if own is None else base - own
        return (base + (c - 1) * again + c * delta).to(x.dtype)
    return ((base if out_scale is None else (base * out_scale).to(x.dtype)) + delta).to(x.dtype)


def lora_linear_gradients(function: Callable[..., Tensor], a: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """y = function(**a) and the gradients of its differentiable arguments, by name: y, dx, dA, ..."""
    leaves = {name: a[name].requires_grad_() for name in LORA_LINEAR_LEAVES if a[name] is not None}
    with torch.enable_grad():
        y = function(**a)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def lora_linear_upstream(a: dict[str, Any]) -> Tensor:
    """A dy for the arguments of a call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*a["x"].shape[:-1], a["weight"].shape[0], generator=generator).to(a["x"].dtype)


@functools.cache
def lora_linear_expected(sample: Sample) -> dict[str, Expected]:
    """What the call of a sample must give, its value and its gradients by name.

    The squared call's results are the sums of the squared terms.
    """
    a = sample.make(0)
    dy, norm = lora_linear_upstream(a), _norm(a)
    plain = lora_linear_gradients(lora_linear_plain, sample.make(0), dy)
    exact, squared = (
        lora_linear_gradients(functools.partial(_formula, power, norm), _wide(a, power), dy.double() ** power)
        for power in (1, 2)
    )
    length = max(a["x"].shape[-1], dy.shape[-1], dy.shape[:-1].numel())
    noise = {n: length**0.5 * 2**-24 * rms(t.sqrt()) for n, t in squared.items()}
    if a["magnitude"] is not None and a["x"].dtype != a["magnitude"].dtype:
        # It is read off y, which was rounded once more than the base product that plain PyTorch keeps.
        noise["dmagnitude"] = 2 * rms(plain["dmagnitude"] - exact["dmagnitude"])
    return {n: Expected(exact[n], plain[n], noise[n]) for n in exact}
