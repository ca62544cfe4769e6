"""What the kernels of `transforms` compute: every function, forward and backward, in every instruction set."""

import functools
import math

import pytest
import torch
from judging import judge
from torch.profiler import ProfilerActivity, profile

import lora_kernels as lk
from lora_kernels.reference.hadamard import is_base
from lora_kernels.testing import (
    TRANSFORM_DTYPES,
    TRANSFORM_FUNCTIONS,
    bitwise_equal,
    rms,
    threads,
    transform_noise,
    transform_oracle,
    transform_plain,
    transform_samples,
    transform_upstream,
    wht_noise,
    wht_oracle,
    wht_plain,
)
from lora_kernels.testing.trigonometric import trigonometric as trigonometric_oracle

FORMS = ("cosine", "hartley", "fourier")
each_function = pytest.mark.parametrize("function", TRANSFORM_FUNCTIONS)
each_dtype = pytest.mark.parametrize("dtype", TRANSFORM_DTYPES)


def samples(function, dtype, *traits, without=()):
    found = transform_samples(function, TRANSFORM_DTYPES[dtype])
    return [s for s in found if s.traits >= set(traits) and not s.traits & set(without)]


@functools.cache
def expected(function, sample):
    """What is judged of y and dx: the oracle, plain PyTorch, the noise."""
    a = sample.make(0)
    x = a.pop("x")
    dy, noise = transform_upstream(x), transform_noise(function, x, **a)
    return {
        name: (*(make(function, t, adjoint=t is dy, **a) for make in (transform_oracle, transform_plain)), noise)
        for name, t in (("y", x), ("dx", dy))
    }


def run(function, sample, count=1):
    """y and dx, made with ``count`` threads."""
    a = sample.make(0)
    x = a.pop("x")
    before, leaf = x.clone(), x.detach().requires_grad_()
    with threads(count):
        y = getattr(lk, function)(leaf, **a)
        (dx,) = torch.autograd.grad(y, leaf, transform_upstream(x))
    assert bitwise_equal(x, before)
    return {"y": y.detach(), "dx": dx}


def check(function, sample, count=1):
    """y and dx within the rule."""
    results = run(function, sample, count)
    for name, got in results.items():
        assert got.dtype == sample.make(0)["x"].dtype
        assert name == "dx" or got.is_contiguous()
        judge(got, *expected(function, sample)[name], f"{name} of {sample.name}")
    return results


@each_function
@each_dtype
def test_reference(function, dtype):
    with lk.backend("reference"):
        for sample in samples(function, dtype):
            check(function, sample)


@each_function
@each_dtype
def test_every_instruction_set(function, dtype, isa):
    for sample in samples(function, dtype, without=("large",)):
        check(function, sample)


@each_function
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_large(function, dtype, isa):
    for sample in samples(function, dtype, "large"):
        check(function, sample)


@each_function
@each_dtype
def test_two_threads(function, dtype):
    """Unforced; two threads change no bit, nor does the second time."""
    for sample in samples(function, dtype):
        both = check(function, sample, 2)
        for other in (run(function, sample, 2), run(function, sample)):
            assert all(bitwise_equal(other[name], both[name]) for name in both), sample.name


@each_function
def test_many_rows(function, cpu_backend):
    """More than one task for each of two threads; the last ones are few."""
    for length, rows in ((12, 70_001), (160, 3001), (1376, 331), (4096, 129)):
        x = torch.randn(rows, length)
        with threads(2):
            y = getattr(lk, function)(x)
        judge(y, transform_oracle(function, x), transform_plain(function, x), transform_noise(function, x), function)
        assert bitwise_equal(y, getattr(lk, function)(x))


ROWS = (*range(1, 21), 31, 32, 33, 63, 64, 65, 70)


@each_function
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_every_number_of_rows(function, dtype, isa):
    """Of lengths that take different ways; a row has the same bits whatever rows are beside it."""
    for length in (4, 64, 160, 344) if function == "wht" else (5, 64, 137, 160):
        x = torch.randn(ROWS[-1], length).to(TRANSFORM_DTYPES[dtype])
        y = getattr(lk, function)(x)
        judge(y, transform_oracle(function, x), transform_plain(function, x), transform_noise(function, x), function)
        for rows in ROWS:
            assert bitwise_equal(getattr(lk, function)(x[-rows:]), y[-rows:]), f"{rows} rows of {length}"


@functools.cache
def of_form(form, N, transpose):
    """Rows of a length, what the op ``trigonometric`` makes of them, in float64 and in plain PyTorch, and noise."""
    x = torch.randn(3 + 200 // N, N, generator=torch.Generator().manual_seed(N))
    exact, plain = (trigonometric_oracle(t, form, 0.75, -1.25, transpose) for t in (x.double(), x))
    row = 1.25 * math.sqrt(N if form == "hartley" else N / 2)
    return x, exact, plain, N**0.5 * 2**-24 * rms(x) * row


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transpose", (False, True))
def test_every_length(form, transpose, isa):
    """Of the op itself, with another first row."""
    for N in (*range(1, 260), 343, 361, 384, 509, 625, 1155, 2310, 4095):
        x, *want = of_form(form, N, transpose)
        got = torch.ops.lora_kernels.trigonometric(x, form, 0.75, -1.25, transpose)
        judge(got, *want, f"{form} of {N}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transpose", (False, True))
def test_every_length_is_read_as_it_lies(form, transpose, isa):
    """Rows that begin at no aligned address and are apart."""
    for N in range(1, 70):
        x, *want = of_form(form, N, transpose)
        room = torch.full((len(x), N + 3), math.nan)[:, 1 : N + 1]
        got = torch.ops.lora_kernels.trigonometric(room.copy_(x), form, 0.75, -1.25, transpose)
        judge(got, *want, f"{form} of {N}")


BASES = [order for order in range(12, 190, 4) if order & (order - 1) and is_base(order)]


@functools.cache
def of_hadamard(N, transpose, layout):
    x = torch.randn(2, N, generator=torch.Generator().manual_seed(N))
    options = {"transpose": transpose, "layout": layout}
    return x, wht_oracle(x, **options), wht_plain(x, **options), wht_noise(x, **options)


@pytest.mark.parametrize("transpose", (False, True))
def test_every_base_and_power(transpose, isa):
    """Each base alone and under each power of two; several bases; QuaRot's."""
    lengths = {2**k * base for base in (1, 12, 20, 28, 172) for k in range(11)}
    lengths |= {2**k * base for base in BASES for k in (0, 1, 3)} | {12 * 28, 12 * 12 * 28, 20 * 20 * 4}
    cases = [(N, "auto") for N in sorted(lengths)] + [(N, "quarot") for N in (20, 40, 160, 72, 1152)]
    for N, layout in cases:
        x, *want = of_hadamard(N, transpose, layout)
        judge(lk.wht(x, transpose=transpose, layout=layout), *want, f"wht of {N}, {layout}")


@pytest.mark.parametrize("transpose", (False, True))
def test_every_haar(transpose, isa):
    """Each number of levels of each short length."""
    function = "ihaar" if transpose else "haar"
    for N in (*range(1, 70), 127, 128, 257, 1000):
        x = torch.randn(3, N)
        for levels in (1, 2, 3, 4, 6, 20):
            oracle, plain = (make(function, x, levels=levels) for make in (transform_oracle, transform_plain))
            y = getattr(lk, function)(x, levels=levels)
            judge(y, oracle, plain, transform_noise(function, x, levels=levels), f"{levels} of {N}")


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@each_function
def test_a_row_that_is_not_finite_stays_alone(function, dtype, value, isa):
    for length in (12, 64, 160, 1376):
        x = torch.randn(19, length).to(TRANSFORM_DTYPES[dtype])
        want = getattr(lk, function)(x)
        x[3, length // 3] = x[16, 0] = value
        y = getattr(lk, function)(x)
        others = [i for i in range(19) if i not in (3, 16)]
        assert bitwise_equal(y[others], want[others]), length
        if "haar" in function:
            with lk.backend("reference"):
                assert torch.equal(y.isfinite(), getattr(lk, function)(x).isfinite()), length
        else:
            assert not y[[3, 16]].isfinite().any(), length


@pytest.mark.parametrize("name", ("wht", "dct", "dht"))
def test_what_outgrows_fp16_is_infinite(name, backend):
    y = getattr(lk, name)(torch.full((3, 64), 60_000.0, dtype=torch.float16), norm=None)
    assert y[:, 0].eq(math.inf).all()
    assert y[:, 1:].abs().max() < 8  # not what fp16 sums would be


@pytest.mark.parametrize("name", ("hadamard", "trigonometric", "haar"))
def test_the_compiled_kernel_runs(name, cpu_backend):
    """Not the reference, whose products and copies the profiler would show; that has fp64 alone."""
    call = {"hadamard": lk.wht, "trigonometric": lk.dct, "haar": lk.haar}[name]

    def seen(dtype):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            call(torch.randn(3, 24, dtype=dtype))
        return {event.key for event in found.key_averages()}

    assert f"lora_kernels_C::{name}" in seen(torch.float32)
    assert not seen(torch.float32) & {"aten::cat", "aten::stack", "aten::mul"}
    assert f"lora_kernels_C::{name}" not in seen(torch.float64)
