"""The ``spectral`` kernels in the checking interpreter, against the reference in float64."""

import dataclasses
import itertools
from contextlib import contextmanager

import pytest
import torch
from guard import programs_backwards
from layouts import strided
from lora_kernels.kernels.triton import spectral
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_kernels as lk
from lora_kernels import SpectralPlan, select
from lora_kernels.ops import _spectral as ops
from lora_kernels.reference import spectral as reference
from lora_kernels.reference.spectral import KINDS
from lora_kernels.testing import LOW_RANK_DTYPES, assert_within_rule, bitwise_equal, rms

DTYPES = ("fp32", "bf16", "fp16", "bf16-masters", "fp16-masters")
# M, N, K, n, with outputs enough for an RMS: one row and several, with few entries and with many; one coefficient;
# more rows than a program's; odd, and more columns of one side than of the other.
SIZES = (
    (1, 260, 137, 40), (1, 257, 12, 1100), (5, 60, 148, 1), (16, 17, 33, 200), (37, 70, 20, 350), (40, 20, 259, 60),
)  # fmt: skip
SCALE = 0.7


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names, launch = [], spectral.launch

    def noting(kernel, *rest, **named):
        names.append(kernel.fn.__name__)
        return launch(kernel, *rest, **named)

    monkeypatch.setattr(spectral, "launch", noting)
    return names


@pytest.fixture(params=("as it is", "blocked"))
def layout(request, monkeypatch):
    """How kernels read the rows: as they are, and from a copy with numbers of several rows side by side."""
    blocked = request.param == "blocked"

    def rows_at_once(rows, entries, features):
        return (1 if rows == 1 else 16 if rows <= 16 or not blocked else 32), blocked and rows > 1

    monkeypatch.setattr(select, "_spectral_rows", rows_at_once)
    return request.param


def call(name, kind, M, N, K, n, seed=0):
    """(x, dy, y's, plan, values): coefficients at any places, some at the same one."""
    torch.manual_seed(seed)
    dtypes = LOW_RANK_DTYPES[name]
    K -= K % 4 if kind == "wht" else 0
    rows, cols = torch.randint(N, (n,)), torch.randint(K, (n,))
    rows[-1], cols[-1] = rows[0], cols[0]
    plan = SpectralPlan(rows, cols, shape=(N, K))
    x, dy, y = torch.randn(M, K).to(dtypes.x), torch.randn(M, N).to(dtypes.x), torch.randn(M, N).to(dtypes.x)
    return x, dy, y, plan, torch.randn(n).to(dtypes.factors)


def in_fp64(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def delta_weight(values, plan, kind, dtype):
    given = plan.entries(kind)[0], *plan.hadamard(kind), kind, *plan.shape, SCALE
    return reference.spectral_delta_weight(values.to(dtype), *given, dtype)


def noise(terms, roundings):
    """√roundings · 2⁻²⁴ of the terms' norm, given the sums of their squares."""
    return roundings**0.5 * 2**-24 * rms(terms.sqrt())


def check_linear(x, values, plan, kind, y=None, run=spectral.spectral_linear):
    """The op against float64; plain PyTorch multiplies by ΔW in the result's dtype."""
    args = x, values, plan.entries(kind)[0], y, *plan.hadamard(kind), kind, plan.shape[0], SCALE
    want = reference.spectral_linear(*in_fp64(args))
    dtype = x.dtype if y is None else y.dtype
    plain = torch.nn.functional.linear(x.to(dtype), delta_weight(values, plan, kind, torch.float32).to(dtype))
    terms = x.double() ** 2 @ delta_weight(values, plan, kind, torch.float64).T ** 2
    if y is not None:
        plain, terms = y + plain, terms + y.double() ** 2
    got = run(*args)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_within_rule(got, want, plain, noise=noise(terms, sum(plan.shape) + plan.n))
    return got


def check_grads(dy, x, values, plan, kind, run=spectral.spectral_linear_grads):
    """dx as :func:`check_linear` has y; the values' gradient is fp32, so plain PyTorch sums in it."""
    args = dy, x, values, *plan.entries(kind), *plan.hadamard(kind), kind, SCALE, True, True
    want = reference.spectral_linear_grads(*in_fp64(args))
    (N, K), weight = plan.shape, delta_weight(values, plan, kind, torch.float64)
    dy_rows, x_rows = dy.reshape(-1, N).float(), x.reshape(-1, K).float()
    given = plan.entries(kind)[0], *plan.hadamard(kind), kind, plan.n, SCALE
    plain = (dy.to(x.dtype) @ weight.float().to(x.dtype), reference.spectral_weight_grad(dy_rows.T @ x_rows, *given))
    roundings = N + K + len(x_rows)
    each = SCALE**2 * (0.5 / (N * K) if kind == "fourier" else 1.0) / (N * K)  # the square of a weight's derivative
    terms = dy.double() ** 2 @ weight**2, each * (dy_rows.double().square().sum(1) @ x_rows.double().square().sum(1))
    got = run(*args)
    assert [t.dtype for t in got] == [x.dtype, torch.float32]
    assert got[0].is_contiguous()
    for name, *three, squares in zip(("dx", "dvalues"), got, want, plain, terms, strict=True):
        assert_within_rule(*three, noise=noise(squares, roundings + plan.n), what=name)
    return got


def every():
    """Every kind and size in fp32 or bf16, every dtype at one."""
    cases = [(("fp32", "bf16")[i % 2], kind, *size) for i, (kind, size) in enumerate(itertools.product(KINDS, SIZES))]
    cases += [(name, kind, *SIZES[3]) for name, kind in itertools.product(DTYPES, ("dct", "wht", "haar"))]
    return [pytest.param(*case, id="-".join(map(str, case))) for case in dict.fromkeys(cases)]


@pytest.mark.parametrize("name, kind, M, N, K, n", every())
def test_both_ways(name, kind, M, N, K, n, layout, launched):
    x, dy, y, plan, values = call(name, kind, M, N, K, n)
    check_linear(x, values, plan, kind)
    check_linear(x, values, plan, kind, y)
    copies = ["block_kernel"] * (layout == "blocked" and M > 1)
    assert launched == 2 * [*copies, "product_kernel"]
    launched.clear()
    check_grads(dy, x, values, plan, kind)
    assert launched == [*copies, *copies, "dot_kernel", "fold_kernel", "product_kernel"]


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_beside_16_bits(kind):
    """y and dy of fp32 are not rounded on the way, and the values' gradient is summed in fp32."""
    x, _, _, plan, values = call("bf16-masters", kind, 9, 60, 36, 100)
    check_linear(x, values, plan, kind, torch.randn(9, 60))
    check_grads(torch.randn(9, 60), x, values, plan, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for(kind, launched):
    x, dy, _, plan, values = call("fp32", kind, 5, 20, 24, 30)
    args = dy, x, values, *plan.entries(kind), *plan.hadamard(kind), kind, SCALE
    both = spectral.spectral_linear_grads(*args, True, True)
    launched.clear()
    dx, none = spectral.spectral_linear_grads(*args, True, False)
    assert launched == ["product_kernel"]
    assert bitwise_equal(dx, both[0])
    assert none.shape == (0,)
    none, dvalues = spectral.spectral_linear_grads(*args, False, True)
    assert launched == ["product_kernel", "dot_kernel", "fold_kernel"]
    assert bitwise_equal(dvalues, both[1])
    assert none.shape == (0,)


@pytest.mark.parametrize("kind", ("fourier", "haar", "wht"))
def test_any_strides(kind, layout):
    """The same bits as in rows side by side."""
    x, dy, y, plan, values = call("bf16", kind, 6, 60, 24, 70)
    want, grads = check_linear(x, values, plan, kind, y), check_grads(dy, x, values, plan, kind)
    for turned in (strided, lambda t: t.T.contiguous().T, lambda t: t.view(2, 3, -1)):
        got = check_linear(turned(x), strided(values), plan, kind, turned(y))
        assert got.shape == turned(y).shape
        assert bitwise_equal(got.view(want.shape), want)
        dx, dvalues = check_grads(turned(dy), turned(x), strided(values), plan, kind)
        assert dx.shape == turned(x).shape
        assert bitwise_equal(dx.view(x.shape), grads[0])
        assert bitwise_equal(dvalues, grads[1])
    got = check_linear(x[:1].expand(6, -1), values, plan, kind, y[:1].expand(6, -1))
    assert bitwise_equal(got, check_linear(x[:1].repeat(6, 1), values, plan, kind, y[:1].repeat(6, 1)))


@pytest.mark.parametrize("steps", (1, 7, 0))
def test_a_gradient_in_parts(steps, layout, monkeypatch):
    """Over many parts of the rows, over few of which the last is short, and as it is chosen."""
    choose, chosen = spectral.spectral_dot_tiles, []

    def parts(rows, *rest):
        tile = choose(rows, *rest)
        blocks = -(-rows // tile.block_m)
        if steps:
            tile = dataclasses.replace(tile, steps=steps, chunks=-(-blocks // steps))
        chosen.append(tile)
        return tile

    monkeypatch.setattr(spectral, "spectral_dot_tiles", parts)
    x, dy, _, plan, values = call("fp32", "fourier", 600, 9, 12, 30)
    check_grads(dy, x, values, plan, "fourier")
    (tile,) = chosen
    assert tile.chunks > 1
    assert (tile.chunks - 1) * tile.steps * tile.block_m < 600 <= tile.chunks * tile.steps * tile.block_m


@pytest.mark.parametrize("kind", ("fourier", "haar"))
def test_programs_in_any_order(kind, layout):
    """Two entries of a coefficient are added atomically, in the order programs come."""
    x, dy, y, plan, values = call("fp32", kind, 20, 40, 36, 200)
    forwards = check_linear(x, values, plan, kind, y), *check_grads(dy, x, values, plan, kind)
    with programs_backwards():
        backwards = check_linear(x, values, plan, kind, y), *check_grads(dy, x, values, plan, kind)
    assert all(map(bitwise_equal, forwards, backwards))


def test_values_that_are_negated():
    """A coefficient of two entries, one of them its negative, which a wave has."""
    plan = SpectralPlan(torch.tensor([3]), torch.tensor([5]), shape=(16, 12))
    coefficients = plan.entries("fourier")[0][-2:]
    assert sorted(coefficients.tolist()) == [-1, 0]
    x, dy, values = torch.randn(4, 12), torch.randn(4, 16), torch.randn(1)
    check_linear(x, values, plan, "fourier")
    check_grads(dy, x, values, plan, "fourier")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M, N, K, n", ((0, 8, 16, 5), (3, 0, 16, 0), (3, 8, 0, 0), (3, 8, 16, 0)))
def test_nothing_to_do(kind, M, N, K, n):
    plan = SpectralPlan(torch.arange(n), torch.arange(n), shape=(N, K))
    x, dy, y, values = torch.randn(M, K), torch.randn(M, N), torch.randn(M, N), torch.randn(n)
    hadamard = plan.hadamard(kind) if K else (None, ())
    for before in (None, y):
        got = spectral.spectral_linear(x, values, plan.entries(kind)[0], before, *hadamard, kind, N, SCALE)
        assert torch.equal(got, torch.zeros(M, N) if before is None else y)
    given = dy, x, values, *plan.entries(kind), *hadamard, kind, SCALE, True, True
    dx, dvalues = spectral.spectral_linear_grads(*given)
    assert torch.equal(dx, torch.zeros(M, K))
    assert torch.equal(dvalues, torch.zeros(n))


def test_what_is_not_a_number_stays_in_its_row(layout):
    N, K, M = 40, 30, 20
    plan = SpectralPlan(torch.arange(60) % N, torch.arange(60) * 7 % K, shape=(N, K))
    x, values, y = torch.randn(M, K), torch.randn(60), torch.zeros(M, N)
    x[2, 7], values[3], y[5, 6] = float("nan"), float("nan"), float("nan")
    got = spectral.spectral_linear(x, values, plan.entries("identity")[0], y, None, (), "identity", N, 1.0)
    wrong = torch.zeros(M, N, dtype=torch.bool)
    wrong[2, plan.rows[plan.cols == 7]], wrong[:, 3], wrong[5, 6] = True, True, True
    assert torch.equal(got.isnan(), wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_as_large_as_the_weight(kind):
    x, dy, y, plan, values = call("fp32", kind, 2, 200, 256, 20)
    args = values, *plan.entries(kind), *plan.hadamard(kind), kind
    with largest_tensor() as largest:
        spectral.spectral_linear(x, *args[:2], y, *args[3:], 200, SCALE)
        spectral.spectral_linear_grads(dy, x, *args, SCALE, True, True)
    assert 0 < largest() < 200 * 256 // 16


@contextmanager
def largest_tensor():
    """How many numbers the largest tensor has that is made inside."""
    sizes = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Noting():
        yield lambda: max(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_all_in_triton(kind, launched):
    """The ops, with those of transforms that they take."""
    x, dy, y, plan, values = call("fp32", kind, 3, 20, 24, 30)
    given = plan.entries(kind)[0], *plan.hadamard(kind), kind
    with lk.backend("triton"):
        check_linear(x, values, plan, kind, y, ops.spectral_linear)
        check_grads(dy, x, values, plan, kind, ops.spectral_linear_grads)
        assert launched.count("product_kernel") == 2
        weight = ops.spectral_delta_weight(values, *given, 20, 24, SCALE, torch.float32)
        grad = ops.spectral_weight_grad(dy.T @ x, *given, 30, SCALE)
    assert_within_rule(
        weight,
        delta_weight(values, plan, kind, torch.float64),
        delta_weight(values, plan, kind, torch.float32),
        noise=noise(delta_weight(values.abs(), plan, kind, torch.float64) ** 2, 74),
    )
    want, plain = (
        reference.spectral_weight_grad((dy.T @ x).to(dtype), *given, 30, SCALE)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_rule(grad, want, plain, noise=noise(want**2, 44))


def test_fp64_is_the_reference_s(launched):
    x, _, y, plan, values = call("fp32", "identity", 3, 20, 24, 30)
    args = in_fp64((x, values, plan.entries("identity")[0], y, None, (), "identity", 20, SCALE))
    with lk.backend("triton"):
        assert bitwise_equal(ops.spectral_linear(*args), reference.spectral_linear(*args))
    assert launched == []
