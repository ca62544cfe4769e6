"""The functions of `spectral` on every backend, against the float64 oracle."""

import functools

import pytest
import torch
from judging import judge
from layouts import strided

import lora_kernels as lk
from lora_kernels.ops import spectral as ops
from lora_kernels.testing import (
    SPECTRAL_DTYPES,
    SPECTRAL_KINDS,
    SPECTRAL_LEAVES,
    bitwise_equal,
    spectral_delta_expected,
    spectral_expected,
    spectral_gradients,
    spectral_location_expected,
    spectral_oracle,
    spectral_plain,
    spectral_samples,
    spectral_upstream,
    threads,
)


def samples(name, *traits, without=()):
    found = spectral_samples(*SPECTRAL_DTYPES[name])
    return [s for s in found if s.traits >= set(traits) and not s.traits & set(without)]


@functools.cache
def named(name, dtypes="fp32"):
    (sample,) = (s for s in samples(dtypes) if s.name == name)
    return sample


def run(sample, count=1, **changes):
    with threads(count), torch.no_grad():
        return lk.spectral_linear(**{**sample.make(0), **changes})


def check(sample, count=1):
    """Within the rule with ``count`` threads."""
    a = sample.make(0)
    y = run(sample, count)
    assert y.dtype == (a["x"] if a["y"] is None else a["y"]).dtype
    assert y.is_contiguous()
    judge(y, *spectral_expected(sample)["y"], f"y of {sample.name}")


@pytest.fixture(params=("activation", "weight"))
def either_way(request, monkeypatch):
    """By transformed rows of x, or by ΔW, whatever is the faster."""
    monkeypatch.setattr(ops, "spectral_route", lambda *args: request.param)
    return request.param


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_reference(name, either_way):
    with lk.backend("reference"):
        for sample in samples(name):
            check(sample)


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_every_instruction_set(name, isa, monkeypatch):
    monkeypatch.setattr(ops, "spectral_route", lambda *args: "activation")
    for sample in samples(name, without=("large",)):
        check(sample)


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_by_the_weight(name, isa, monkeypatch):
    monkeypatch.setattr(ops, "spectral_route", lambda *args: "weight")
    for sample in samples(name, without=("large", "strided")):
        check(sample)


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_large(name, isa):
    for sample in samples(name, "large"):
        check(sample)


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_as_users_call(name):
    for sample in samples(name):
        check(sample)


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_two_threads(name, cpu_backend):
    """Within the rule, and the same bits twice with two threads as with one."""
    for sample in samples(name):
        check(sample, 2)
        for count in (1, 2):
            assert bitwise_equal(run(sample, count), run(sample, count)), sample.name


ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65)


@pytest.mark.parametrize("name", ("fp32", "bf16"))
@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_every_number_of_rows(kind, name, isa):
    a = named(f"{kind}-more-than-sizes", name).make(0)
    plan, values, scale, dtype = a["plan"], a["values"], a["scale"], a["x"].dtype
    x = torch.randn(max(ROWS), plan.shape[1]).to(dtype)
    W = spectral_oracle(torch.eye(plan.shape[1]), values, plan, kind=kind, scale=scale).T
    plain = spectral_plain(x, values, plan, kind=kind, scale=scale)
    for rows in ROWS:
        m = x[:rows]
        noise = 12 * 2**-24 * float((m.double() ** 2 @ W.T**2).mean().sqrt())
        y = lk.spectral_linear(m, values, plan, kind=kind, scale=scale)
        judge(y, m.double() @ W.T, plain[:rows], noise, f"{rows} rows")


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_delta_weight(name, backend):
    for sample in samples(name):
        a = sample.make(0)
        del a["x"], a["y"]
        W = lk.spectral_delta_weight(**a)
        assert (W.dtype, W.shape) == (a["values"].dtype, a["plan"].shape)
        assert W.is_contiguous()
        judge(W, *spectral_delta_expected(sample), f"W of {sample.name}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_dtype_of_the_delta_weight(kind, dtype, backend):
    for name in ("fp32", "bf16"):
        for sample in (named(f"{kind}-tall", name), named(f"{kind}-primes", name)):
            a = sample.make(0)
            W = lk.spectral_delta_weight(a["values"], a["plan"], kind=kind, scale=a["scale"], dtype=dtype)
            assert W.dtype == dtype
            judge(W, *spectral_delta_expected(sample, dtype), f"W of {sample.name}")


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_location_grad(name, backend):
    clamped = 0
    for sample in samples(name, "dct"):
        a = sample.make(0)
        given = spectral_upstream(a), a["x"], a["values"], a["plan"]
        got = lk.spectral_location_grad(*given, scale=a["scale"])
        for d, (what, want) in zip(got, spectral_location_expected(sample).items(), strict=True):
            assert (d.dtype, d.shape) == (torch.float32, a["values"].shape)
            judge(d, *want, f"{what} of {sample.name}")
            clamped += int((d.abs() == 1).sum())
        again = lk.spectral_location_grad(*given, kind="dct", scale=a["scale"])
        assert all(map(bitwise_equal, got, again)), sample.name
    assert clamped > 100


def test_location_grad_is_not_differentiable(route):
    a = named("dct-primes").make(0)
    dy = spectral_upstream(a)
    leaves = [t.requires_grad_() for t in (dy, a["x"], a["values"])]
    d_rows, d_cols = lk.spectral_location_grad(*leaves, a["plan"], scale=a["scale"])
    assert not d_rows.requires_grad
    assert not d_cols.requires_grad


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_twice_the_same_bits_and_inputs_untouched(name, kind, backend):
    for sample in samples(name, kind, without=("large",)):
        a = sample.make(0)
        plan = a["plan"]
        tensors = [*(a[n] for n in SPECTRAL_LEAVES if a[n] is not None), plan.rows, plan.cols, *plan.entries(kind)]
        before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
        y, again = (lk.spectral_linear(**a) for _ in range(2))
        assert bitwise_equal(y, again), sample.name
        assert all(bitwise_equal(t, b) for t, b in zip(tensors, before, strict=True)), sample.name
        assert [t._version for t in tensors] == versions
        if a["y"] is not None:
            assert y.data_ptr() != a["y"].data_ptr() or not y.numel(), "y is not written"


@pytest.mark.parametrize("name", ("fp32", "bf16", "fp16-masters"))
def test_layouts(name, backend):
    """Of x, values and y: what contiguous ones give."""
    for sample in samples(name, "strided"):
        a = sample.make(0)
        dense = {n: a[n].contiguous() for n in SPECTRAL_LEAVES if a[n] is not None}
        assert any(not a[n].is_contiguous() for n in dense) or "expanded" in sample.name
        torch.testing.assert_close(run(sample), run(sample, **dense), msg=sample.name)


def test_more_layouts(backend):
    for kind in SPECTRAL_KINDS:
        sample = named(f"{kind}-3d")
        a, want = sample.make(0), run(sample)
        one = a["values"][:1].expand(a["plan"].n)
        others = {"x": strided(a["x"]), "y": strided(a["y"]), "values": strided(a["values"])}
        for changes in (others, *({name: t} for name, t in others.items())):
            torch.testing.assert_close(run(sample, **changes), want)
        assert bitwise_equal(run(sample, values=one), run(sample, values=one.clone()))
        assert not torch.equal(run(sample, values=one), want)


def test_leading_axes_are_rows(backend):
    for kind in SPECTRAL_KINDS:
        a = named(f"{kind}-3d").make(0)
        flat = {n: a[n].reshape(-1, a[n].shape[-1]) for n in ("x", "y")}
        y, rows = lk.spectral_linear(**a), lk.spectral_linear(**{**a, **flat})
        assert y.shape == a["y"].shape
        assert bitwise_equal(y.reshape(rows.shape), rows)
        vector = lk.spectral_linear(**{**a, "x": flat["x"][3], "y": flat["y"][3]})
        torch.testing.assert_close(vector, rows[3])


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_without_y_and_with_zeros(kind, backend):
    """y is added in fp32: nothing is rounded before."""
    a = named(f"{kind}-tall").make(0)
    delta = lk.spectral_linear(**{**a, "y": None})
    torch.testing.assert_close(lk.spectral_linear(**{**a, "y": torch.zeros_like(a["y"])}), delta, rtol=0, atol=1e-6)
    torch.testing.assert_close(lk.spectral_linear(**a), a["y"] + delta)
    half = {**a, "x": a["x"].bfloat16(), "y": a["y"]}
    exact = a["y"] + half["x"].float() @ lk.spectral_delta_weight(a["values"], a["plan"], kind=kind, scale=a["scale"]).T
    torch.testing.assert_close(lk.spectral_linear(**half), exact, rtol=1e-5, atol=1e-5)


def test_duplicates_add_up(route):
    rows, cols = torch.tensor([3, 3, 3, 1]), torch.tensor([2, 2, 2, 0])
    merged = lk.SpectralPlan(rows[2:], cols[2:], shape=(5, 4))
    plan, values, x = lk.SpectralPlan(rows, cols, shape=(5, 4)), torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.randn(6, 4)
    for kind in SPECTRAL_KINDS:
        want = lk.spectral_linear(x, torch.tensor([7.0, 8.0]), merged, kind=kind)
        torch.testing.assert_close(lk.spectral_linear(x, values, plan, kind=kind), want)


def test_no_coefficients_or_nothing_at_all(route):
    none = torch.zeros(0, dtype=torch.int64)
    for kind in SPECTRAL_KINDS:
        for N, K in ((5, 4), (0, 4)) + (((5, 0), (0, 0)) if kind != "wht" else ()):
            plan, y = lk.SpectralPlan(none, none, shape=(N, K)), torch.randn(3, N)
            assert bitwise_equal(lk.spectral_linear(torch.randn(3, K), torch.zeros(0), plan, kind=kind, y=y), y)
            assert not lk.spectral_linear(torch.randn(3, K), torch.zeros(0), plan, kind=kind).any()
            assert not lk.spectral_delta_weight(torch.zeros(0), plan, kind=kind).any()


def test_a_known_weight(route):
    """ΔW of one coefficient at (1, 1) of a spectrum [2, 2], by hand."""
    plan, value, root = lk.SpectralPlan(*[torch.tensor([1])] * 2, shape=(2, 2)), torch.tensor([4.0]), 0.5**0.5
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    wants = {
        "fourier": checkers, "dct": 2 * checkers, "hartley": 2 * checkers, "haar": 2 * checkers,
        "identity": torch.tensor([[0.0, 0.0], [0.0, 4.0]]), "wht": 4 * root * torch.tensor([[0.0, 0.0], [1.0, -1.0]]),
    }  # fmt: skip
    for kind, want in wants.items():
        torch.testing.assert_close(lk.spectral_delta_weight(value, plan, kind=kind), want)
        torch.testing.assert_close(lk.spectral_linear(torch.eye(2), value, plan, kind=kind), want.T)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_no_graph_where_none_is_wanted(kind, route):
    a = named(f"{kind}-tall").make(0)
    want = lk.spectral_linear(**a)
    for name in ("x", "values"):
        a[name].requires_grad_()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y, W = lk.spectral_linear(**a), lk.spectral_delta_weight(a["values"], a["plan"], kind=kind)
        assert bitwise_equal(y, want)
        assert not y.requires_grad
        assert not W.requires_grad


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_autocast(kind, name, route):
    """As if x, and what is not fp32, had been cast before: the bits, in autocast's dtype; gradients in their own."""
    for sample in (named(f"{kind}-tall", name), named(f"{kind}-wide", name), named(f"{kind}-x-columns", name)):
        a, b = sample.make(0), sample.make(0)
        for n in SPECTRAL_LEAVES:
            if b[n] is not None and (n == "x" or b[n].dtype != torch.float32):
                b[n] = b[n].bfloat16()
        dy = spectral_upstream(b)

        def call(**a):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return lk.spectral_linear(**a)

        with torch.no_grad():
            assert bitwise_equal(call(**a), lk.spectral_linear(**b))
        want, got = (spectral_gradients(f, c, dy) for f, c in ((lk.spectral_linear, b), (call, a)))
        for n, t in got.items():
            assert t.dtype == (want["y"] if n == "y" else a[n[1:]]).dtype
            assert bitwise_equal(t, want[n].to(t.dtype)), n


def test_a_layer_under_autocast(route):
    """The base's y is in autocast's dtype, x is not."""
    plan, linear = lk.SpectralPlan.random(30, (24, 20)), torch.nn.Linear(20, 24)
    x, values = torch.randn(3, 20), torch.randn(30, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lk.spectral_linear(x, values, plan, kind="dct", y=linear(x))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert values.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (4, 33))
def test_not_a_number_stays_in_its_row(rows, dtype, kind, route):
    """In x and y, forward; in dy and x, backward."""
    a = named(f"{kind}-more-than-sizes", "fp32" if dtype == torch.float32 else "bf16").make(0)
    (N, K), given = a["plan"].shape, (a["values"], a["plan"])
    x, y, dy = (torch.randn(rows, size).to(dtype) for size in (K, N, N))
    spoilt, others = x.clone(), [i for i in range(rows) if i not in (1, 2)]
    spoilt[1, 5], spoilt[2, K - 1] = float("nan"), float("inf")
    want = lk.spectral_linear(x, *given, kind=kind, y=y)
    got = lk.spectral_linear(spoilt, *given, kind=kind, y=y)
    assert bitwise_equal(got[others], want[others])
    assert not got[1].isfinite().all()
    assert not got[2].isfinite().all()
    dy[2, 3] = float("nan")
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(lk.spectral_linear(leaf, *given, kind=kind, y=y), leaf, dy)
    assert not dx[2].isfinite().all()
    assert dx[[i for i in range(rows) if i != 2]].isfinite().all()


def test_a_value_that_is_no_number_reaches_what_it_touches(route):
    plan = lk.SpectralPlan(torch.tensor([1, 3]), torch.tensor([0, 2]), shape=(5, 4))
    y = lk.spectral_linear(torch.ones(3, 4), torch.tensor([1.0, float("nan")]), plan, kind="identity")
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, 4]].isfinite().all()


def test_large_numbers_in_fp16(route):
    """What is between x and y may be more than fp16 holds: sums are in fp32."""
    x = torch.full((20, 256), 3e4, dtype=torch.float16)
    plan = lk.SpectralPlan(torch.tensor([0]), torch.tensor([0]), shape=(64, 256))
    for kind, scale in (("fourier", 64.0), ("dct", 0.125), ("hartley", 0.125), ("wht", 1 / 64)):
        y = lk.spectral_linear(x, torch.ones(1, dtype=torch.float16), plan, kind=kind, scale=scale)
        want = spectral_oracle(x, torch.ones(1), plan, kind=kind, scale=scale)
        torch.testing.assert_close(y.double(), want, rtol=2**-10, atol=0)
        assert y.isfinite().all()
