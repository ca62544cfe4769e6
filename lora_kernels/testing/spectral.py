"""Samples, oracle and yardstick of the ``spectral`` family: adapters whose weight is a transform of a sparse spectrum.

The oracle builds ΔW densely from each kind's formula, by torch's FFT, matrices of cosines or blocks of ±½. Of the
package it has only Hadamard's bases, which tests hold against QuaRot's tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spectral_plan import SpectralPlan
from .lora_linear import LORA_LINEAR_DTYPES, Expected
from .low_rank import Dtypes, _laid_out
from .numerics import Sample, rms
from .transforms import wht_factors

#: Every combination of dtypes the family takes, by name: of x, of the values, and of y where it is not said to be fp32.
SPECTRAL_DTYPES = LORA_LINEAR_DTYPES
SPECTRAL_KINDS = ("fourier", "dct", "hartley", "identity", "wht", "haar")
#: The differentiable arguments.
SPECTRAL_LEAVES = ("x", "values", "y")


@dataclass(frozen=True)
class _Case:
    """A sample before it has a kind and a dtype.

    ``order`` is K for the kind wht, which has no matrix of every order. ``places`` says how many different ones the n
    coefficients have, all where None; ``y`` is None, "same" as x or "wide", fp32.
    """

    name: str
    rows: tuple[int, ...]
    N: int
    K: int
    n: int
    order: int
    y: str | None = None
    places: int | None = None
    layout: str = "auto"
    x: str = "dense"
    values: str = "dense"
    y_layout: str = "dense"
    scale: float = 0.7
    kinds: tuple[str, ...] = SPECTRAL_KINDS
    traits: tuple[str, ...] = ()


_CASES = (
    _Case("no-rows", (0,), 48, 36, 20, 36, "same"),
    _Case("no-rows-3d", (3, 0), 48, 36, 20, 36),
    _Case("no-coefficients", (5,), 48, 36, 0, 36, "same"),
    _Case("vector", (), 40, 70, 90, 64, "same"),
    _Case("all-ones", (1,), 1, 1, 1, 1, "same"),
    _Case("two", (2,), 2, 2, 4, 2, "same"),
    _Case("three", (3,), 3, 3, 9, 4),
    _Case("one-in", (16,), 33, 1, 20, 1, "wide"),
    _Case("one-out", (17,), 1, 63, 20, 64),
    _Case("two-in", (15,), 31, 2, 40, 2, "same"),
    _Case("one-coefficient", (7,), 50, 61, 1, 60, "same"),
    _Case("one-row", (1,), 160, 131, 300, 128, "same"),
    _Case("odd", (7,), 63, 37, 50, 36, "same"),
    _Case("odd-even", (15,), 45, 32, 60, 32, "wide"),
    _Case("even-odd", (16,), 32, 45, 60, 44),
    _Case("prime", (17,), 31, 61, 58, 60),
    _Case("primes", (33,), 97, 53, 150, 52, "same"),
    _Case("square", (33,), 64, 64, 100, 64),
    _Case("tall", (16,), 160, 48, 230, 48, "same"),
    _Case("wide", (70,), 48, 160, 230, 160, "wide"),
    _Case("few", (70,), 80, 96, 3, 96, "same"),
    _Case("more-than-sizes", (15,), 40, 56, 300, 56, "same"),
    _Case("half-of-all", (17,), 24, 30, 360, 28),
    _Case("all-places", (33,), 17, 12, 204, 12, "same"),
    _Case("base-12", (7,), 33, 24, 40, 24, kinds=("wht",)),
    _Case("base-28", (7,), 33, 56, 60, 56, "same", kinds=("wht",)),
    _Case("base-20-transposes", (16,), 20, 80, 60, 80, "same", kinds=("wht",)),
    _Case("quarot-36", (9,), 50, 144, 120, 144, "same", layout="quarot", kinds=("wht",)),
    _Case("quarot-2-20", (9,), 50, 160, 120, 160, layout="quarot", kinds=("wht",)),
    _Case("duplicates", (16,), 40, 36, 60, 36, "same", places=8),
    _Case("all-at-one-place", (7,), 30, 20, 40, 20, places=1),
    _Case("scale-of-zero", (5,), 30, 20, 40, 20, "same", scale=0.0),
    _Case("scale-below-zero", (5,), 60, 40, 40, 40, "same", scale=-2.5),
    _Case("3d", (3, 11), 40, 36, 60, 36, "wide"),
    _Case("4d-blocks", (2, 3, 4), 40, 24, 60, 24, "same", x="blocks"),
    _Case("x-columns", (12,), 45, 36, 60, 36, x="columns"),
    _Case("x-rows", (12,), 45, 36, 60, 36, "same", x="rows"),
    _Case("x-transposed", (35,), 45, 36, 60, 36, x="transposed"),
    _Case("x-swapped", (5, 4), 45, 36, 60, 36, "same", x="swapped"),
    _Case("x-expanded", (10,), 45, 36, 60, 36, x="expanded"),
    _Case("y-transposed", (35,), 45, 36, 60, 36, "same", y_layout="transposed"),
    _Case("y-columns-wide", (12,), 45, 36, 60, 36, "wide", y_layout="columns"),
    _Case("values-strided", (9,), 45, 36, 60, 36, "same", values="strided"),
    _Case("m300", (300,), 256, 320, 1000, 320, "same", traits=("large",)),
    _Case("three-percent", (33,), 320, 512, 4915, 512, "same", traits=("large",)),
    _Case("model", (4,), 1152, 896, 1000, 896, "same", traits=("large",)),
)  # fmt: skip


def spectral_samples(x: torch.dtype = torch.float32, values: torch.dtype | None = None, *_: Any) -> list[Sample]:
    """The samples of ``spectral_linear`` in the given dtypes (``*SPECTRAL_DTYPES[name]``).

    Each makes ``x, values, plan, kind, scale, y``. What lies between the rows of a strided x or y and between strided
    values is NaN.

    Traits: the kind; ``strided``; ``large`` (slow for the oracle).

    Args:
        x: dtype of x.
        values: dtype of the values; x's where None.
    """
    return _samples(Dtypes(x, values or x, x))


@functools.cache
def _samples(dtypes: Dtypes) -> list[Sample]:
    samples = []
    for case in _CASES:
        traits = {*case.traits} | ({"strided"} if {case.x, case.values, case.y_layout} != {"dense"} else set())
        for kind in case.kinds:
            make = functools.partial(_make, case, kind, dtypes)
            samples.append(Sample(f"{kind}-{case.name}", make, frozenset({*traits, kind})))
    return samples


@functools.cache
def _plan(case: _Case, kind: str) -> SpectralPlan:
    shape = N, K = case.N, case.order if kind == "wht" else case.K
    generator = torch.Generator().manual_seed(2)
    places = torch.randperm(N * K, generator=generator)[: case.places or case.n]
    if case.places:
        places = places[torch.randint(0, case.places, (case.n,), generator=generator)]
    return SpectralPlan(places // K, places % K, shape=shape, layout=case.layout)  # type: ignore[arg-type]


def _make(case: _Case, kind: str, dtypes: Dtypes, seed: int = 0) -> dict[str, Any]:
    generator, plan = torch.Generator().manual_seed(seed), _plan(case, kind)
    (N, K), n = plan.shape, max(plan.n, 1)
    x = _laid_out((*case.rows, K), case.x, dtypes.x, generator)
    values = torch.randn(plan.n, generator=generator, dtype=torch.float64).to(dtypes.factors)
    if case.values == "strided":
        values = values.new_full((2 * plan.n + 1,), math.nan)[1::2].copy_(values)
    y = None
    if case.y is not None:
        wide = torch.promote_types(dtypes.y, torch.float32)
        y = _laid_out((*case.rows, N), case.y_layout, wide if case.y == "wide" else dtypes.y, generator)
    unit = math.sqrt(2 * N**2 * K / n) if kind == "fourier" else math.sqrt(N / n)  # makes x ΔWᵀ of about 1
    return {"x": x, "values": values, "plan": plan, "kind": kind, "scale": case.scale * unit, "y": y}


@functools.cache
def cosines(N: int) -> Tensor:
    """C, the orthonormal DCT-II, in float64: C[k, j] = √(2/N) cos(π k (2j + 1) / 2N), its first row by √½ besides."""
    k, j = torch.arange(N)[:, None], torch.arange(N)
    C = math.sqrt(2 / N) * (math.pi / (2 * N) * (k * (2 * j + 1) % (4 * N)).double()).cos()
    C[0] *= math.sqrt(0.5)
    return C


@functools.cache
def cas(N: int) -> Tensor:
    """Q, the orthonormal Hartley transform, in float64: Q[k, j] = (cos(2π jk / N) + sin(2π jk / N)) / √N."""
    angle = 2 * math.pi / N * (torch.arange(N)[:, None] * torch.arange(N) % N).double()
    return (angle.cos() + angle.sin()) / math.sqrt(N)


@functools.cache
def walsh_hadamard(K: int, layout: str) -> Tensor:
    """H, in float64, with entries ±1/√K."""
    return functools.reduce(torch.kron, wht_factors(K, layout), torch.ones(1, 1, dtype=torch.float64)) / math.sqrt(K)


def dense(values: Tensor, plan: SpectralPlan, kind: str, scale: float, dtype: torch.dtype) -> Tensor:
    """ΔW, [N, K], computed in a dtype; differentiable."""
    N, K = plan.shape
    S = torch.zeros(N, K, dtype=dtype).index_put((plan.rows, plan.cols), values.to(dtype), accumulate=True)
    if kind == "fourier":
        W = torch.fft.ifft2(S).real
    elif kind == "dct":
        W = cosines(N).to(dtype).T @ S @ cosines(K).to(dtype)
    elif kind == "hartley":
        W = cas(N).to(dtype) @ S @ cas(K).to(dtype)
    elif kind == "wht":
        W = S @ walsh_hadamard(K, plan.layout).to(dtype)
    elif kind == "haar":
        W = _blocks(S)
    else:
        W = S
    return W * scale


def _blocks(S: Tensor) -> Tensor:
    """A block of 2 by 2, ½ (a ± b ± c ± d), for each place of S's quadrants a, b right of it, c below it and d."""
    N, K = S.shape
    S = F.pad(S, (0, K % 2, 0, N % 2))
    (a, b), (c, d) = (half.chunk(2, 1) for half in S.chunk(2, 0))
    top = torch.stack((a + b + c + d, a + b - c - d), -1).flatten(-2)
    bottom = torch.stack((a - b + c - d, a - b - c + d), -1).flatten(-2)
    return torch.stack((top, bottom), 1).flatten(0, 1)[:N, :K] / 2


def spectral_oracle(
    x: Tensor, values: Tensor, plan: SpectralPlan, *, kind: str, scale: float = 1.0, y: Tensor | None = None
) -> Tensor:
    """(y or 0) + x ΔWᵀ in float64, differentiable: the truth a sample is held against."""
    delta = x.double() @ dense(values, plan, kind, scale, torch.float64).T
    return delta if y is None else y.double() + delta


def spectral_plain(
    x: Tensor, values: Tensor, plan: SpectralPlan, *, kind: str, scale: float = 1.0, y: Tensor | None = None
) -> Tensor:
    """The same as PEFT writes it: all of ΔW, made in fp32, in the values' dtype, and a product in that dtype."""
    W = spectral_delta_plain(values, plan, kind=kind, scale=scale)
    delta = F.linear(x.to(W.dtype), W)
    return delta.to(x.dtype) if y is None else (y + delta).to(y.dtype)


def spectral_delta_plain(
    values: Tensor, plan: SpectralPlan, *, kind: str, scale: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """ΔW in plain PyTorch."""
    W = dense(values, plan, kind, scale, torch.promote_types(values.dtype, torch.float32))
    return W.to(dtype or values.dtype)


def spectral_gradients(function: Callable[..., Tensor], a: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """y = function(**a) and the gradients of its differentiable arguments, by name: y, dx, dvalues and perhaps dy."""
    leaves = {name: a[name].requires_grad_() for name in SPECTRAL_LEAVES if a[name] is not None}
    with torch.enable_grad():
        y = function(**a)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def spectral_upstream(a: dict[str, Any]) -> Tensor:
    """A dy for the arguments of a call."""
    generator, x, y = torch.Generator().manual_seed(1), a["x"], a["y"]
    dy = torch.randn(*x.shape[:-1], a["plan"].shape[0], generator=generator, dtype=torch.float64)
    return dy.to(x.dtype if y is None else y.dtype)


@functools.cache
def spectral_expected(sample: Sample) -> dict[str, Expected]:
    """What the call of a sample must give, its value and its gradients by name."""
    a = sample.make(0)
    dy = spectral_upstream(a)
    plain = spectral_gradients(spectral_plain, sample.make(0), dy)
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in a.items()}
    exact = spectral_gradients(spectral_oracle, wide, dy.double())
    noise = _noise(dy, **a)
    return {n: Expected(exact[n], plain[n], noise[n]) for n in exact}


def _noise(dy: Tensor, x: Tensor, values: Tensor, plan: SpectralPlan, kind: str, scale: float, y: Tensor | None):
    """√length · 2⁻²⁴ of the terms' norm, by result; the terms of a value's gradient are dy x times its part in ΔW."""
    N, K = plan.shape
    W = dense(values.detach(), plan, kind, scale, torch.float64)
    x, dy = (t.detach().double().reshape(-1, t.shape[-1]) for t in (x, dy))
    unit = _norm_of_one(kind, N, K, scale)
    terms = {
        "y": x**2 @ W.T**2 + (0 if y is None else y.detach().double().reshape(-1, N) ** 2),
        "dx": dy**2 @ W**2,
        "dvalues": (dy**2).sum(1) @ (x**2).sum(1) * (unit**2 / max(N * K, 1)),
        "dy": torch.zeros(1),
    }
    return {name: _length(N, K, x.shape[0]) ** 0.5 * 2**-24 * rms(t.sqrt()) for name, t in terms.items()}


def _length(N: int, K: int, rows: int) -> int:
    """How many roundings a term sees: one an addition of each sum it is in, and some eight products on its way."""
    return N + K + rows + 8


@functools.cache
def spectral_delta_expected(sample: Sample, dtype: torch.dtype | None = None) -> Expected:
    """What ΔW of a sample's values must be, in a dtype, theirs where None."""
    a = sample.make(0)
    values, (N, K) = a["values"], a["plan"].shape
    given = {name: a[name] for name in ("values", "plan", "kind", "scale")}
    noise = _length(N, K, 0) ** 0.5 * 2**-24 * _norm_of_one(a["kind"], N, K, a["scale"]) * float(values.double().norm())
    exact, plain = dense(**given, dtype=torch.float64), spectral_delta_plain(**given, dtype=dtype)
    return Expected(exact, plain, noise / max(N * K, 1) ** 0.5)


def _norm_of_one(kind: str, N: int, K: int, scale: float) -> float:
    """The Frobenius norm of the ΔW of one coefficient of 1."""
    return abs(scale) * (math.sqrt(0.5 / max(N * K, 1)) if kind == "fourier" else 1.0)


def spectral_location_oracle(
    dy: Tensor, x: Tensor, values: Tensor, plan: SpectralPlan, *, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """LoCA's gradients of the places from all of scale · C (dyᵀ x) Cᵀ, in a dtype; in fp32 also the plain way."""
    (N, K), p, q = plan.shape, plan.rows, plan.cols
    x, dy, half = x.reshape(-1, K).to(dtype), dy.reshape(-1, N).to(dtype), values.to(dtype) / 2
    D = cosines(N).to(dtype) @ (scale * (dy.T @ x)) @ cosines(K).to(dtype).T
    D = torch.cat((D[:1], D, D[-1:]))
    D = torch.cat((D[:, :1], D, D[:, -1:]), 1)  # D[p, q] is now at (p + 1, q + 1)
    d_rows, d_cols = D[p + 2, q + 1] - D[p, q + 1], D[p + 1, q + 2] - D[p + 1, q]
    return (half * d_rows).clamp(-1, 1), (half * d_cols).clamp(-1, 1)


@functools.cache
def spectral_location_expected(sample: Sample) -> dict[str, Expected]:
    """d_rows and d_cols of a sample of the kind dct."""
    a = sample.make(0)
    dy, values = spectral_upstream(a), a["values"]
    given = {name: a[name] for name in ("x", "values", "plan", "scale")}
    exact, plain = (spectral_location_oracle(dy, **given, dtype=d) for d in (torch.float64, torch.float32))
    noise = _noise(dy, **a)["dvalues"] * rms(values) / math.sqrt(2)
    return {name: Expected(exact[i], plain[i], noise) for i, name in enumerate(("d_rows", "d_cols"))}
