"""Samples, oracles and yardsticks of every function of ``transforms`` by its name; those of ``wht`` are its own."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .low_rank import _laid_out
from .numerics import Sample, rms
from .transforms import wht_noise, wht_oracle, wht_plain, wht_samples

#: Every function of the family.
TRANSFORM_FUNCTIONS = ("wht", "dct", "idct", "dht", "haar", "ihaar")
#: The lengths of the layers of Gemma, Qwen, Llama, Mistral and GLM.
MODEL_LENGTHS = (
    2304, 2560, 3072, 3584, 4864, 5120, 5376, 8960, 9728, 11008, 13696, 13824, 14336, 17408, 18944, 21504, 25600, 27648,
    28672, 29568, 53248,
)  # fmt: skip
#: (length, rows): small ones, odd ones, primes, their squares, products and doubles, powers of two.
_LENGTHS = (
    (1, 7), (2, 70), (3, 33), (4, 70), (5, 70), (6, 70), (7, 70), (8, 33), (9, 70), (11, 33), (12, 33), (13, 33),
    (15, 17), (16, 70), (17, 16), (21, 15), (25, 16), (31, 7), (32, 17), (36, 7), (45, 2), (49, 16), (60, 33), (64, 15),
    (81, 1), (97, 5), (100, 17), (127, 3), (128, 16), (137, 17), (150, 4), (169, 2), (201, 15), (256, 33), (258, 1),
    (274, 16), (343, 3), (500, 17), (512, 7), (625, 2), (768, 15), (1000, 1), (1024, 16), (1069, 3), (1155, 2),
    (2048, 5), (2138, 1), (4096, 17), (4489, 1), (8192, 2), (9973, 1), (16384, 1), (32768, 1),
)  # fmt: skip
_LARGE = 8000
_DENSE = 512  # the longest row that is multiplied by the matrix itself


@dataclass(frozen=True)
class _Case:
    """A sample before it has a function and a dtype. ``rows`` are x's leading sizes."""

    name: str
    rows: tuple[int, ...]
    N: int
    x: str = "dense"


_CASES = (
    _Case("no-rows", (0,), 64),
    _Case("no-rows-3d", (3, 0), 45),
    _Case("vector", (), 128),
    *(_Case(f"length-{N}", (rows,), N) for N, rows in _LENGTHS),
    _Case("x-columns", (12,), 96, x="columns"),
    _Case("x-columns-odd", (7,), 45, x="columns"),
    _Case("x-rows", (16,), 137, x="rows"),
    _Case("x-transposed", (35,), 80, x="transposed"),
    _Case("x-expanded", (17,), 128, x="expanded"),
    _Case("x-3d", (3, 5), 64),
    _Case("x-3d-blocks", (3, 7), 56, x="blocks"),
    _Case("x-3d-swapped", (5, 4), 48, x="swapped"),
    _Case("x-4d", (2, 3, 4), 60, x="blocks"),
    *(_Case(f"model-{N}", (1 + i % 3,), N) for i, N in enumerate(MODEL_LENGTHS)),
)
_COSINE = (
    {"type": 2, "norm": "ortho"},
    {"type": 3, "norm": "ortho"},
    {"type": 2, "norm": None},
    {"type": 3, "norm": None},
)
_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "dct": _COSINE,
    "idct": _COSINE,
    "dht": ({"norm": "ortho"}, {"norm": None}),
    "haar": ({"levels": 1}, {"levels": 2}, {"levels": 3}, {"levels": 40}, {"levels": 5}),
    "ihaar": ({"levels": 1}, {"levels": 2}, {"levels": 3}, {"levels": 40}, {"levels": 5}),
}


def transform_samples(function: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """The samples of a function of ``transforms`` in a dtype.

    Each makes the call's arguments. The options take turns, in step in a function and its inverse; all lengths of
    models are ``dct``'s, and each other function has a quarter of them. What lies between the rows of a strided x is
    NaN.

    Traits: ``strided``, ``large`` (rows of thousands); ``wht`` has ``odd`` too, see :func:`wht_samples`.
    """
    return wht_samples(dtype) if function == "wht" else _samples(function, dtype)


@functools.cache
def _samples(function: str, dtype: torch.dtype) -> list[Sample]:
    found, turn = [], TRANSFORM_FUNCTIONS.index(function) % 4
    for i, case in enumerate(_CASES):
        if function != "dct" and case.name.startswith("model") and i % 4 != turn:
            continue
        options = _OPTIONS[function][(i + i // 4) % len(_OPTIONS[function])]
        traits = {"large"} if case.N >= _LARGE else set()
        traits |= set() if case.x == "dense" else {"strided"}
        found.append(Sample(case.name, functools.partial(_make, case, dtype, options), frozenset(traits)))
    return found


def _make(case: _Case, dtype: torch.dtype, options: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": _laid_out((*case.rows, case.N), case.x, dtype, generator), **options}


def transform_oracle(function: str, x: Tensor, *, adjoint: bool = False, **options: Any) -> Tensor:
    """A function of ``transforms``, or with ``adjoint`` its transpose, of x in float64.

    By the matrix itself; of long rows by complex Fourier transforms of the row, padded with zeros to twice its length
    for the cosine transforms, and by the formula of the Haar transform.
    """
    if function == "wht":
        return wht_oracle(x, **_transposed(options, adjoint))
    return _computed(function, x.double(), adjoint, options)


def transform_plain(function: str, x: Tensor, *, adjoint: bool = False, **options: Any) -> Tensor:
    """The same in plain PyTorch: in fp32, rounded to x's dtype once."""
    if function == "wht":
        return wht_plain(x, **_transposed(options, adjoint))
    return _computed(function, x.float(), adjoint, options).to(x.dtype)


def transform_noise(function: str, x: Tensor, **options: Any) -> float:
    """√K · 2⁻²⁴ of the norm of the K terms that one output sums: what rounding costs an fp32 sum."""
    N = x.shape[-1]
    if function == "wht":
        return wht_noise(x, **options)
    if function in ("haar", "ihaar"):
        return min(2 ** options.get("levels", 1), N) ** 0.5 * 2**-24 * rms(x)
    form, first, rest, _ = _form(function, N, **options)
    half = N if form == "hartley" else N / 2  # of a row's squares
    return N**0.5 * 2**-24 * rms(x) * math.sqrt((first**2 * N + (N - 1) * rest**2 * half) / N)


def transform_upstream(x: Tensor) -> Tensor:
    """A gradient of what the function gives for x, always the same."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.dtype)


def _transposed(options: dict[str, Any], adjoint: bool) -> dict[str, Any]:
    return {**options, "transpose": options.get("transpose", False) != adjoint}


def _computed(function: str, x: Tensor, adjoint: bool, options: dict[str, Any]) -> Tensor:
    if function in ("haar", "ihaar"):
        return _haar(x, options.get("levels", 1), (function == "ihaar") != adjoint)
    form, first, rest, transpose = _form(function, x.shape[-1], **options)
    return trigonometric(x, form, first, rest, transpose != adjoint)


def _form(function: str, N: int, type: int = 2, norm: str | None = "ortho") -> tuple[str, float, float, bool]:
    """The form, the diagonal and whether they are transposed; scipy's conventions."""
    if function == "dht":
        scale = 1.0 if norm is None else N**-0.5
        return "hartley", scale, scale, False
    inverse = function == "idct"
    third = (type == 3) != inverse
    if norm == "ortho":
        return "cosine", math.sqrt(1 / N), math.sqrt(2 / N), third
    whole = 2 * N if inverse else 1
    return "cosine", (1 if third else 2) / whole, 2 / whole, third


def trigonometric_matrix(form: str, N: int) -> Tensor:
    """T of the op ``trigonometric`` in float64; its angles are reduced as integers, before they are rounded."""
    k, j = torch.arange(N)[:, None], torch.arange(N)
    if form == "cosine":
        return _turns(4 * N).cos()[k * (2 * j + 1) % (4 * N)]
    cos, sin = (wave[k * j % N] for wave in (_turns(N).cos(), _turns(N).sin()))
    return cos + sin if form == "hartley" else torch.where(k <= N // 2, cos, -sin)


def _turns(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)


def trigonometric(x: Tensor, form: str, first: float, rest: float, transpose: bool) -> Tensor:
    """D T x or (D T)ᵀ x in x's own dtype, see the op of that name."""
    N = x.shape[-1]
    D = torch.full((N,), rest, dtype=torch.float64)
    D[0] = first
    x = x * D.to(x) if transpose else x
    if N <= _DENSE:
        T = trigonometric_matrix(form, N).to(x)
        y = x @ (T if transpose else T.T)
    else:
        y = _by_fft(x, form, transpose)
    return y if transpose else y * D.to(x)


def _by_fft(x: Tensor, form: str, transpose: bool) -> Tensor:
    N = x.shape[-1]
    if form == "cosine":
        quarter = torch.arange(N, dtype=torch.float64) * (-math.pi / (2 * N))
        turn = torch.polar(torch.ones_like(quarter), quarter).to(x.dtype.to_complex())
        if transpose:
            return torch.fft.fft(x * turn, 2 * N).real[..., :N]
        return (torch.fft.fft(x, 2 * N)[..., :N] * turn).real
    if form == "hartley":
        V = torch.fft.fft(x)
        return V.real - V.imag
    cosines, sines = N // 2 + 1, (N - 1) // 2
    if transpose:
        V = torch.zeros_like(x, dtype=x.dtype.to_complex())
        V[..., :cosines] = x[..., :cosines]
        V[..., 1 : 1 + sines] += 1j * x[..., cosines:].flip(-1)
        return torch.fft.fft(V).real
    V = torch.fft.fft(x)
    return torch.cat((V.real[..., :cosines], -V.imag[..., 1 : 1 + sines].flip(-1)), -1)


def haar_matrix(N: int, levels: int) -> Tensor:
    """The matrix of ``haar`` in float64: the product of its levels' matrices."""
    whole, n = torch.eye(N, dtype=torch.float64), N
    while levels and n > 1:
        j, low, level = torch.arange(n // 2), (n + 1) // 2, torch.zeros(n, n, dtype=torch.float64)
        level[j, 2 * j] = level[j, 2 * j + 1] = level[low + j, 2 * j] = math.sqrt(0.5)
        level[low + j, 2 * j + 1] = -math.sqrt(0.5)
        if n % 2:
            level[low - 1, n - 1] = 1
        whole[:n] = level @ whole[:n]
        levels, n = levels - 1, low
    return whole


def _haar(x: Tensor, levels: int, transpose: bool) -> Tensor:
    N = x.shape[-1]
    if N <= _DENSE:
        M = haar_matrix(N, levels).to(x)
        return x @ (M if transpose else M.T)
    y, lengths = x.clone(), [N]
    while len(lengths) < levels and lengths[-1] > 1:
        lengths.append((lengths[-1] + 1) // 2)
    for n in reversed(lengths) if transpose else lengths:
        half, low, part = n // 2, (n + 1) // 2, y[..., :n].clone()
        pairs, halves = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)), (slice(0, half), slice(low, n))
        source, target = (halves, pairs) if transpose else (pairs, halves)
        if n % 2:
            y[..., n - 1 if transpose else low - 1] = part[..., low - 1 if transpose else n - 1]
        a, b = (part[..., at] for at in source)
        y[..., target[0]], y[..., target[1]] = (a + b) * math.sqrt(0.5), (a - b) * math.sqrt(0.5)
    return y
