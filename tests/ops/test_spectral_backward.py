"""Gradients of `spectral` against those of the float64 oracle; what is kept and allocated for them."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from judging import judge
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.ops import spectral as ops
from lora_kernels.testing import (
    SPECTRAL_DTYPES,
    SPECTRAL_KINDS,
    SPECTRAL_LEAVES,
    bitwise_equal,
    spectral_expected,
    spectral_gradients,
    spectral_oracle,
    spectral_samples,
    spectral_upstream,
    threads,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from memory import allocations


def samples(name, *traits, without=()):
    found = spectral_samples(*SPECTRAL_DTYPES[name])
    return [s for s in found if s.traits >= set(traits) and not s.traits & set(without)]


def named(name, dtypes="fp32"):
    (sample,) = (s for s in samples(dtypes) if s.name == name)
    return sample


def results(sample, count=1):
    a = sample.make(0)
    with threads(count):
        return spectral_gradients(lk.spectral_linear, a, spectral_upstream(a))


def check(sample, count=1):
    """The value and every gradient of a sample within the rule, made with ``count`` threads."""
    a = sample.make(0)
    for name, got in results(sample, count).items():
        if name != "y":
            assert got.dtype == a[name[1:]].dtype
        judge(got, *spectral_expected(sample)[name], f"{name} of {sample.name}")


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
    """Within the rule, and the same bits twice with as many threads."""
    for sample in samples(name):
        check(sample, 2)
        for count in (1, 2):
            for p, q in zip(results(sample, count).values(), results(sample, count).values(), strict=True):
                assert bitwise_equal(p, q), sample.name


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
@pytest.mark.parametrize("shape", ("tall", "primes", "all-places"))
@pytest.mark.parametrize("dtypes", ("fp32", "bf16", "bf16-masters"))
def test_any_subset_may_be_frozen(kind, shape, dtypes, route):
    """What does not require grad gets none, and the others' gradients keep their bits."""
    sample = named(f"{kind}-{shape}", dtypes)
    full = results(sample)
    for wanted in itertools.chain(*(itertools.combinations(SPECTRAL_LEAVES, r) for r in (1, 2, 3))):
        a = sample.make(0)
        for n in wanted:
            a[n].requires_grad_()
        y = lk.spectral_linear(**a)
        y.backward(spectral_upstream(a))
        for n in SPECTRAL_LEAVES:
            if n in wanted:
                assert bitwise_equal(a[n].grad, full[f"d{n}"]), f"{n} of {wanted}"
            else:
                assert a[n].grad is None


@pytest.mark.parametrize("name", ("fp32", "bf16-masters"))
def test_inputs_are_untouched_and_a_second_backward_has_the_bits(name, backend):
    for sample in samples(name, without=("large",)):
        a = sample.make(0)
        leaves = [a[n] for n in SPECTRAL_LEAVES if a[n] is not None]
        before, versions = [t.clone() for t in leaves], [t._version for t in leaves]
        for t in leaves:
            t.requires_grad_()
        y, dy = lk.spectral_linear(**a), spectral_upstream(a)
        kept = dy.clone()
        first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
        assert all(map(bitwise_equal, first, second)), sample.name
        assert all(map(bitwise_equal, leaves, before)), sample.name
        assert bitwise_equal(dy, kept)
        assert [t._version for t in leaves] == versions


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_gradients_of_strided_and_expanded_dy(kind, backend):
    """dy comes in any layout: of a sum it is one number expanded."""
    for shape in ("3d", "primes"):
        sample = named(f"{kind}-{shape}")
        dy = spectral_upstream(sample.make(0))
        wide = torch.full((*dy.shape[:-1], 2 * dy.shape[-1]), float("nan"))[..., ::2].copy_(dy)
        swapped = dy.transpose(0, 1).contiguous().transpose(0, 1)
        ones = torch.ones(()).expand(dy.shape)
        for other in (wide, swapped, ones):
            want = spectral_gradients(lk.spectral_linear, sample.make(0), other.contiguous())
            for n, t in spectral_gradients(lk.spectral_linear, sample.make(0), other).items():
                torch.testing.assert_close(t, want[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradient_of_the_delta_weight(kind, dtype, backend):
    """That of a sum with any dW, transposed and expanded ones too; in the values' dtype."""
    a = named(f"{kind}-primes").make(0)
    values, plan, scale = a["values"].to(dtype).requires_grad_(), a["plan"], a["scale"]
    N, K = plan.shape
    for dW in (torch.randn(N, K), torch.randn(K, N).T, torch.ones(()).expand(N, K)):
        W = lk.spectral_delta_weight(values, plan, kind=kind, scale=scale)
        (got,) = torch.autograd.grad(W, values, dW.to(dtype))
        wide = values.detach().double().requires_grad_()
        y = spectral_oracle(torch.eye(K), wide, plan, kind=kind, scale=scale)
        (want,) = torch.autograd.grad(y, wide, dW.to(dtype).double().T)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-3 * scale
        )


SIZE, M, COUNT = 2048, 4, 1000


def layer(dtype):
    plan = lk.SpectralPlan.random(COUNT, (SIZE, SIZE))
    x, y = torch.randn(M, SIZE).to(dtype), torch.randn(M, SIZE).to(dtype)
    return x, torch.randn(COUNT), plan, y


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_never_builds_the_weight(kind, dtype, backend):
    """Forward and backward at once take a few times x and y and the values, and nothing near ΔW's 16 MB."""
    x, values, plan, y = layer(dtype)
    leaves, dy = [t.requires_grad_() for t in (x, values, y)], torch.randn(M, SIZE).to(dtype)

    def step():
        torch.autograd.grad(lk.spectral_linear(x, values, plan, kind=kind, y=y), leaves, dy)

    step()  # what the first call alone allocates: the plan's order
    _, peak = allocations(step)
    e = 2 * COUNT  # entries, at most
    assert peak < 4 * (10 * M * 2 * SIZE + 8 * e + 6 * M * e), peak
    assert peak < SIZE * SIZE * 4 // 10


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_saves_nothing_that_is_transformed(kind, backend):
    """x and the values themselves, and what the plan has; not y."""
    x, values, plan, y = layer(torch.bfloat16)
    x, values, y = x.view(2, 2, SIZE).requires_grad_(), values.requires_grad_(), y.view(2, 2, SIZE).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        lk.spectral_linear(x, values, plan, kind=kind, y=y)
    owned = {t.data_ptr() for t in (x, values, *plan.entries(kind))}
    if kind == "wht" and plan.hadamard(kind)[0] is not None:
        owned.add(plan.hadamard(kind)[0].data_ptr())
    assert {t.data_ptr() for t in kept} <= owned
    assert [t.shape for t in kept if t.data_ptr() == x.data_ptr()] == [x.shape]


@pytest.mark.parametrize("name", ("x", "values"))
def test_saved_tensors_are_guarded(name, backend):
    a = named("dct-primes").make(0)
    y = lk.spectral_linear(**{n: t.requires_grad_() if n in SPECTRAL_LEAVES else t for n, t in a.items()})
    with torch.no_grad():
        a[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_that_is_overwritten(backend):
    """No gradient is read off y."""

    def run(change):
        a = named("dct-primes").make(0)
        leaves = [a[n].requires_grad_() for n in SPECTRAL_LEAVES]
        y = lk.spectral_linear(**a)
        return torch.autograd.grad((y.mul_(2) if change else y * 2).sum(), leaves)

    for p, q in zip(run(True), run(False), strict=True):
        assert bitwise_equal(p, q)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_no_second_derivative(kind, backend):
    """An error, not a wrong number."""
    a = named(f"{kind}-primes").make(0)
    x, values = a["x"].requires_grad_(), a["values"].requires_grad_()
    W = lk.spectral_delta_weight(values, a["plan"], kind=kind)
    for y, leaf in ((lk.spectral_linear(**a), x), (W, values)):
        (d,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            d.sum().backward()


def test_a_backend_holds_for_the_backward_pass(monkeypatch):
    """What the forward was forced to, the backward takes, outside the block too."""
    ran = []
    for op in (ops.spectral_linear_grads, ops.spectral_weight_grad):
        monkeypatch.setattr(op, "reference", lambda *args, f=op.reference, n=op.name: (ran.append(n), f(*args))[1])
    a = named("dct-primes").make(0)
    a["values"].requires_grad_()
    with lk.backend("reference"):
        y = lk.spectral_linear(**a)
        W = lk.spectral_delta_weight(a["values"], a["plan"], kind="dct")
    (y.sum() + W.sum()).backward()
    assert sorted(ran) == ["spectral_linear_grads", "spectral_weight_grad"]


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_gives_the_same_bits(reentrant, route):
    plans = [lk.SpectralPlan.random(60, shape) for shape in ((24, 20), (20, 24))]
    x, *values = torch.randn(5, 20), torch.randn(60), torch.randn(60)

    def layers(x, v, w):
        y = lk.spectral_linear(x, v, plans[0], kind="fourier", scale=50.0)
        return lk.spectral_linear(torch.nn.functional.gelu(y), w, plans[1], kind="haar", y=x)

    def run(call):
        leaves = [t.clone().requires_grad_() for t in (x, *values)]
        y = call(*leaves)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(t.grad for t in leaves)]

    plain = run(layers)
    for p, q in zip(plain, run(lambda *leaves: checkpoint(layers, *leaves, use_reentrant=reentrant)), strict=True):
        assert bitwise_equal(p, q)
        assert p.abs().max() > 0


def test_values_used_by_two_layers(route):
    """Gradients add up, with one plan for both kinds."""
    plan, x = lk.SpectralPlan.random(60, (24, 24)), torch.randn(5, 24)
    values = torch.randn(60, requires_grad=True)
    ys = [lk.spectral_linear(x, values, plan, kind=kind) for kind in ("dct", "wht")]
    each = [torch.autograd.grad(y.sum(), values, retain_graph=True)[0] for y in ys]
    (both,) = torch.autograd.grad(sum(ys).sum(), values)
    torch.testing.assert_close(both, sum(each))
    assert not torch.equal(*each)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_inference_before_training(kind, route):
    """What a plan keeps from a call in inference mode serves training."""
    plan, values = lk.SpectralPlan.random(60, (24, 20)), torch.randn(60, requires_grad=True)
    plan = lk.SpectralPlan(plan.rows, plan.cols, shape=plan.shape)  # nobody else's, with nothing kept
    x = torch.randn(5, 20)
    with torch.inference_mode():
        want = lk.spectral_linear(x, values, plan, kind=kind)
        made = lk.SpectralPlan(plan.rows.clone(), plan.cols.clone(), shape=plan.shape)
    for each in (plan, made):
        y = lk.spectral_linear(x, values, each, kind=kind)
        assert bitwise_equal(y.detach(), want)
        (d,) = torch.autograd.grad(y.sum(), values)
        assert d.abs().max() > 0
