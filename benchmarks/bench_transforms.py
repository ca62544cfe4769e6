"""``transforms`` on matrices of rows beside a copy of them, plain PyTorch, scipy, PyWavelets and dense products.

Whatever reads a matrix once and writes another one takes at least what ``Tensor.clone`` takes, which is timed in the
same turns. Everything makes a new result of the same x, and what it frees stays with the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from allocator import keeping_freed_memory
from compare import OURS, check, compare
from roofs import Work, timed
from torch import Tensor

import lora_kernels as lk
from lora_kernels.testing import threads, transform_noise, transform_oracle, transform_plain

scipy_fft, pywt = pytest.importorskip("scipy.fft"), pytest.importorskip("pywt")

COPY, PLAIN, DENSE = "a copy", "plain PyTorch", "dense product"
SCIPY, PYWT = "scipy", "PyWavelets"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: function, rows, length, dtype, threads (0: all of torch's) and who else computes it.
CASES = (
    ("wht", 256, 4096, "fp32", 0, (COPY, PLAIN, DENSE)),
    ("wht", 1024, 4096, "fp32", 0, (COPY, PLAIN, DENSE)),
    ("wht", 256, 4096, "bf16", 0, (COPY, PLAIN)),
    ("wht", 256, 14336, "fp32", 0, (COPY, PLAIN)),
    ("wht", 256, 11008, "fp32", 0, (COPY, PLAIN)),
    ("dct", 256, 4096, "fp32", 1, (COPY, PLAIN, SCIPY)),
    ("dct", 256, 4096, "fp32", 0, (COPY, PLAIN, SCIPY, DENSE)),
    ("dct", 256, 11008, "fp32", 0, (COPY, PLAIN, SCIPY)),
    ("idct", 256, 4096, "fp32", 0, (COPY, PLAIN, SCIPY)),
    ("dht", 256, 4096, "fp32", 0, (COPY, PLAIN, DENSE)),
    ("haar", 256, 4096, "fp32", 1, (COPY, PLAIN, PYWT)),
    ("haar", 256, 4096, "fp32", 0, (COPY, PLAIN)),
)


def wht(x: Tensor) -> Tensor:
    """A butterfly a factor of two, and a product with a base where the length has one: the package's reference."""
    with lk.backend("reference"):
        return lk.wht(x)


def dct(x: Tensor) -> Tensor:
    """By one complex Fourier transform of the reordered row, as torch-dct does it."""
    N = x.shape[-1]
    V = torch.fft.fft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1))
    angle = torch.arange(N, dtype=x.dtype) * (-math.pi / (2 * N))
    y = V.real * angle.cos() - V.imag * angle.sin()
    y[..., 0] *= N**-0.5
    y[..., 1:] *= (2 / N) ** 0.5
    return y


def idct(x: Tensor) -> Tensor:
    """By one complex Fourier transform and the reordering of its result, as torch-dct does it."""
    N = x.shape[-1]
    x = torch.cat((x[..., :1] * N**0.5, x[..., 1:] * (N / 2) ** 0.5), -1)
    angle = torch.arange(N, dtype=x.dtype) * (math.pi / (2 * N))
    imag = torch.cat((torch.zeros_like(x[..., :1]), -x[..., 1:].flip(-1)), -1)
    cos, sin = angle.cos(), angle.sin()
    v = torch.fft.irfft(torch.complex(x * cos - imag * sin, x * sin + imag * cos), n=N)
    y = torch.empty_like(x)
    y[..., ::2], y[..., 1::2] = v[..., : (N + 1) // 2], v[..., (N + 1) // 2 :].flip(-1)
    return y


def dht(x: Tensor) -> Tensor:
    """By one Fourier transform."""
    V = torch.fft.fft(x, norm="ortho")
    return V.real - V.imag


def haar(x: Tensor) -> Tensor:
    """Sums and differences of pairs."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((a + b, a - b), -1).mul_(math.sqrt(0.5))


@cache
def matrix(function: str, length: int) -> Tensor:
    """What a row is multiplied by from the right."""
    return transform_oracle(function, torch.eye(length)).float()


def call_of(name: str, function: str, x: Tensor, count: int) -> Callable[[], Any]:
    """A call that computes ``function`` of x."""
    if name == OURS:
        return partial(getattr(lk, function), x)
    if name == COPY:
        return x.clone
    if name == PLAIN:
        return partial(globals()[function], x)
    if name == DENSE:
        return partial(torch.mm, x, matrix(function, x.shape[-1]))
    if name == SCIPY:
        return partial(getattr(scipy_fft, function), x.numpy(), norm="ortho", workers=count)
    return partial(pywt.dwt, x.numpy(), "haar")


def as_tensor(result: Any) -> Tensor:
    """What a provider gave."""
    if isinstance(result, tuple):
        return torch.cat([torch.from_numpy(part) for part in result], -1)
    return result if isinstance(result, Tensor) else torch.from_numpy(result)


def flops(function: str, x: Tensor) -> int:
    """Of the fast algorithm for a power of two."""
    log = math.log2(x.shape[-1])
    return int(x.numel() * {"wht": log, "haar": 2}.get(function, 2.5 * log))


def with_threads(count: int, call: Callable[[], object]) -> float:
    """Seconds of a call with so many threads."""
    with threads(count):
        return timed(call)


def case_id(case: tuple) -> str:
    function, rows, length, dtype, count, _ = case
    return f"{function}-{rows}-{length}-{dtype}{'-alone' if count else ''}"


@pytest.fixture(scope="module")
def transform_case(request, rounds, roofs):
    function, rows, length, dtype, count, others = request.param
    count = count or torch.get_num_threads()
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    with torch.no_grad(), keeping_freed_memory() as kept:
        calls = {name: call_of(name, function, x, count) for name in (OURS, *others)}
        results = {name: as_tensor(call()) for name, call in calls.items() if name != COPY}
        exact, plain = transform_oracle(function, x), transform_plain(function, x)
        check(results, exact, plain, noise=transform_noise(function, x), what=f"{function} of {rows} × {length}")
        return compare(
            f"transforms {case_id(request.param)}",
            {name: partial(with_threads, count, call) for name, call in calls.items()},
            rounds(31, 301, 10),
            roofs=roofs,
            probes=("copy", "float32"),
            work=dict.fromkeys(calls, Work(flops(function, x), 2 * x.nbytes, torch.float32)),
            freed_memory_kept=kept,
            function=function,
            M=rows,
            N=length,
            dtype=dtype,
            threads=count,
            peers={"scipy": version("scipy"), "PyWavelets": version("PyWavelets")},
        )


EACH = [pytest.param(case, name, id=f"{case_id(case)}-{name}") for case in CASES for name in (OURS, *case[-1])]


@pytest.mark.parametrize(("transform_case", "provider"), EACH, indirect=["transform_case"])
def test_transform(replay, transform_case, provider):
    replay(transform_case, provider)
