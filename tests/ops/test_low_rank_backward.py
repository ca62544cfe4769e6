"""Gradients of multi_lora and lora_linear, against those of the float64 oracle."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels.testing import (
    LOW_RANK_DTYPES,
    Dtypes,
    adapter_count,
    assert_within_rule,
    bitwise_equal,
    low_rank_oracle,
    low_rank_plain,
    low_rank_samples,
    low_rank_terms,
    rms,
    threads,
)

FP64 = Dtypes(torch.float64, torch.float64, torch.float64)


def samples(*names, without=("nan",)):
    return [
        pytest.param(sample, id=f"{name}-{sample.name}")
        for name in names
        for sample in low_rank_samples(*LOW_RANK_DTYPES[name])
        if not sample.traits & set(without)
    ]


def leaves(a):
    """The differentiable arguments by name, those of A and B numbered."""
    out = {name: a[name] for name in ("y", "x", "weights") if a[name] is not None}
    for name in ("A", "B"):
        parts = (a[name],) if isinstance(a[name], torch.Tensor) else a[name]
        out |= {f"{name}[{i}]": t for i, t in enumerate(parts)}
    return out


def gradients(function, a, dy):
    inputs = leaves(a)
    for t in inputs.values():
        t.requires_grad_()
    out = function(**a)
    grads = torch.autograd.grad(out, list(inputs.values()), dy.to(out.dtype), materialize_grads=True)
    return out.detach(), dict(zip(inputs, grads, strict=True))


def map_floats(function, a):
    """The arguments with a function applied to every floating tensor and number."""

    def apply(value):
        if isinstance(value, torch.Tensor):
            return function(value.detach()) if value.is_floating_point() else value
        if isinstance(value, (tuple, list)):
            return type(value)(apply(v) for v in value)
        return function(value) if isinstance(value, float) else value

    return {name: apply(value) for name, value in a.items()}


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def upstream(a):
    return torch.randn(a["y"].shape, generator=torch.Generator().manual_seed(1)).to(a["y"].dtype)


@functools.cache
def expected(sample):
    """{leaf: (oracle, plain, noise)}: the squared call's gradients are the sums of the squared terms."""
    a = sample.make(0)
    dy = upstream(a)
    _, plain = gradients(low_rank_plain, sample.make(0), dy)
    _, oracle = gradients(low_rank_oracle, map_floats(double, a), dy.double())
    _, squared = gradients(low_rank_oracle, map_floats(lambda t: double(t) ** 2, a), dy.double() ** 2)
    length = max(a["x"].shape[-1], dy.shape[-1], dy.numel() // dy.shape[-1])
    noise = {name: length**0.5 * 2**-24 * rms(t.sqrt()) for name, t in squared.items()}
    return {name: (oracle[name], plain[name], noise[name]) for name in oracle}


@functools.cache
def expected_value(sample):
    a = sample.make(0)
    return low_rank_oracle(**a), low_rank_plain(**a), a["x"].shape[-1] ** 0.5 * 2**-24 * low_rank_terms(**a)


def check(sample, count=1):
    """The gradients of a sample, made with ``count`` threads, and its value."""
    a = sample.make(0)
    with threads(count):
        out, got = gradients(lk.multi_lora, a, upstream(a))
    for name, (oracle, plain, noise) in expected(sample).items():
        assert got[name].dtype == leaves(a)[name].dtype
        assert_within_rule(got[name], oracle, plain, noise=noise, what=f"the gradient of {name} in {sample.name}")
    assert bitwise_equal(got["y"], upstream(a))
    want, plain, noise = expected_value(sample)
    assert_within_rule(out, want, plain, noise=noise, what=sample.name)


@pytest.mark.parametrize("sample", samples("fp32", "bf16-masters"))
def test_reference(sample):
    with lk.backend("reference"):
        check(sample)


@pytest.mark.parametrize(
    "sample",
    samples("fp32", "bf16", "bf16-masters")
    + samples("fp16", "fp16-masters", "bf16-y32", "bf16-masters-y32", without=("nan", "large")),
)
def test_cpu(sample, cpu_backend):
    check(sample)


@pytest.mark.parametrize("name", ("fp32", "bf16", "fp16", "bf16-masters"))
def test_every_instruction_set(name, isa):
    for sample in low_rank_samples(*LOW_RANK_DTYPES[name]):
        if not sample.traits & {"nan", "large"}:
            check(sample)


@pytest.mark.parametrize("name", ("fp32", "bf16-masters"))
def test_two_threads(name, cpu_backend):
    for sample in low_rank_samples(*LOW_RANK_DTYPES[name]):
        if "nan" not in sample.traits:
            check(sample, count=2)


GRADCHECK = [s for s in low_rank_samples(*FP64) if not s.traits & {"large", "nan"}]


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.name) for s in GRADCHECK if s.name != "x-expanded"])
def test_gradcheck(sample):
    a = sample.make(0)
    inputs = leaves(a)
    names = [name for name, t in inputs.items() if t.numel()]

    def call(*tensors):
        new = {**inputs, **dict(zip(names, tensors, strict=True))}
        A, B = ([t for n, t in new.items() if n.startswith(f"{name}[")] for name in ("A", "B"))
        if "listed" not in sample.traits:
            A, B = tuple(A), tuple(B)
        return lk.multi_lora(**{**a, "x": new["x"], "y": new["y"], "weights": new.get("weights"), "A": A, "B": B})

    with lk.backend("reference"):
        if a["y"].numel():
            assert torch.autograd.gradcheck(call, [inputs[n].requires_grad_() for n in names], fast_mode=True)
        else:
            assert call(*[inputs[n].requires_grad_() for n in names]).shape == a["y"].shape


def one(sample_name, dtype_name="fp32"):
    (sample,) = (s for s in low_rank_samples(*LOW_RANK_DTYPES[dtype_name]) if s.name == sample_name)
    return sample


NAMED = ("live-ranks", "gate-up-live-ranks", "listed", "mixture-of-3", "strided")


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtypes", ("fp32", "bf16", "bf16-masters"))
def test_any_subset_may_be_frozen(name, dtypes, backend):
    """What does not require grad gets none, and the others' gradients keep their bits."""
    sample = one(name, dtypes)
    a = sample.make(0)
    dy = upstream(a)
    _, full = gradients(lk.multi_lora, a, dy)
    groups = [["x"], ["y"], [n for n in full if n[0] == "A"], [n for n in full if n[0] == "B"]]
    groups += [["weights"]] if "weights" in full else []
    groups += [[f"A[{i}]"] for i in range(1, 2) if f"A[{i}]" in full]
    for size in (1, 2):
        for chosen in itertools.combinations(groups, size):
            wanted = [n for group in chosen for n in group]
            b = sample.make(0)
            inputs = leaves(b)
            for n in wanted:
                inputs[n].requires_grad_()
            lk.multi_lora(**b).backward(dy)
            for n, t in inputs.items():
                if n in wanted:
                    assert bitwise_equal(t.grad, full[n]), f"{n} of {wanted}"
                else:
                    assert t.grad is None


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtypes", ("fp32", "bf16"))
def test_twice_the_same_bits_and_inputs_untouched(name, dtypes, backend):
    sample = one(name, dtypes)
    a = sample.make(0)
    dy = upstream(a)
    inputs = leaves(a)
    before = {n: t.clone() for n, t in inputs.items()}
    versions = {n: t._version for n, t in inputs.items()}
    for t in inputs.values():
        t.requires_grad_()
    out = lk.multi_lora(**a)
    first = torch.autograd.grad(out, list(inputs.values()), dy, retain_graph=True)
    second = torch.autograd.grad(out, list(inputs.values()), dy)
    _, again = gradients(lk.multi_lora, sample.make(0), dy)
    for n, p, q in zip(inputs, first, second, strict=True):
        assert bitwise_equal(p, q)
        assert bitwise_equal(p, again[n])
        assert bitwise_equal(inputs[n].detach(), before[n])
        assert inputs[n]._version == versions[n]


@pytest.mark.parametrize("name", ("live-ranks", "mixture-of-2", "qkv", "listed"))
def test_a_plan_gives_the_bits_of_ids(name, backend):
    sample = one(name)
    a = sample.make(0)
    dy = upstream(a)
    _, want = gradients(lk.multi_lora, a, dy)
    L = adapter_count(a["A"])
    plan = lk.BatchPlan.empty(a["adapter_ids"].numel() + 5, L).update_(a["adapter_ids"])
    _, got = gradients(lk.multi_lora, {**sample.make(0), "adapter_ids": plan}, dy)
    for n in want:
        assert bitwise_equal(got[n], want[n]), n


def test_no_y_is_a_y_of_zeros(backend):
    a = one("qkv").make(0)
    dy = upstream(a)
    _, none = gradients(lambda y, **rest: lk.multi_lora(**rest) + 0 * y, a, dy)
    b = one("qkv").make(0)
    b["y"] = torch.zeros_like(b["y"])
    _, zeros = gradients(lk.multi_lora, b, dy)
    for n in ("x", "A[0]", "A[2]", "B[0]", "B[1]"):
        assert bitwise_equal(none[n], zeros[n])


@pytest.mark.parametrize("dtypes", ("fp32", "bf16", "bf16-masters"))
@pytest.mark.parametrize("shape", ((23, 64, 48, 8, 4), (70, 100, 136, 33, 3)))
def test_an_adapters_gradients_are_its_own(dtypes, shape, backend):
    """dA and dB of an adapter have the bits of a run with its rows alone."""
    M, K, N, R, L = shape
    x_dtype, factor_dtype, _ = LOW_RANK_DTYPES[dtypes]
    x, dy = torch.randn(M, K).to(x_dtype), torch.randn(M, N).to(x_dtype)
    A, B = torch.randn(L, R, K).to(factor_dtype), torch.randn(L, N, R).to(factor_dtype)
    ids = torch.randint(-1, L, (M,))

    def run(rows):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        lk.multi_lora(x[rows], a, b, ids[rows], scaling=0.5).backward(dy[rows])
        return a.grad, b.grad

    dA, dB = run(torch.arange(M))
    for l in range(L):
        alone_A, alone_B = run((ids == l).nonzero()[:, 0])
        assert bitwise_equal(dA[l], alone_A[l])
        assert bitwise_equal(dB[l], alone_B[l])
        assert dA[l].abs().max() > 0
        others = torch.arange(L) != l
        assert not alone_A[others].any()
        assert not alone_B[others].any()


def test_saved_tensors_are_guarded(backend):
    for name in ("x", "A[0]", "B[0]"):
        a = one("qkv").make(0)
        inputs = leaves(a)
        for t in inputs.values():
            t.requires_grad_()
        out = lk.multi_lora(**a)
        with torch.no_grad():
            inputs[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_no_second_derivative(backend):
    a = one("odd").make(0)
    a["x"] = torch.randn_like(a["x"]).requires_grad_()
    (dx,) = torch.autograd.grad(lk.multi_lora(**a).square().nansum(), a["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.nansum().backward()


def linear_inputs(name, M, K, N, R):
    x_dtype, factor_dtype, _ = LOW_RANK_DTYPES[name]
    return {
        "x": torch.randn(M, K).to(x_dtype),
        "weight": (torch.randn(N, K) / K**0.5).to(x_dtype),
        "A": (torch.randn(R, K) / K**0.5).to(factor_dtype),
        "B": (torch.randn(N, R) / R**0.5).to(factor_dtype),
        "bias": torch.randn(N).to(x_dtype),
    }


def plain_linear(x, weight, A, B, bias, scaling):
    ids = torch.zeros(x.shape[0], dtype=torch.int64)
    return low_rank_plain(F.linear(x, weight, bias), x, A[None], B[None], ids, scaling=scaling)


@pytest.mark.parametrize("name", ("fp32", "bf16", "fp16", "bf16-masters", "fp16-masters"))
@pytest.mark.parametrize("shape", ((1, 64, 96, 8), (7, 63, 1000, 3), (65, 576, 192, 32)))
def test_lora_linear(name, shape, backend):
    inputs = linear_inputs(name, *shape)
    dy = torch.randn(shape[0], shape[2]).to(inputs["x"].dtype)
    wanted = ("x", "A", "B", "bias")

    def run(function, values):
        values = {n: t.clone().requires_grad_(n in wanted) for n, t in values.items()}
        out = function(**values, scaling=0.7)
        return dict(zip(wanted, torch.autograd.grad(out, [values[n] for n in wanted], dy.to(out.dtype)), strict=True))

    got = run(lk.lora_linear, inputs)
    plain = run(plain_linear, inputs)
    doubled = {n: t.double() for n, t in inputs.items()}
    oracle = run(lambda x, weight, A, B, bias, scaling: F.linear(x, weight, bias) + scaling * (x @ A.T) @ B.T, doubled)
    for n in wanted:
        noise = max(shape) ** 0.5 * 2**-24 * rms(oracle[n]) * 4
        assert got[n].dtype == inputs[n].dtype
        assert_within_rule(got[n], oracle[n], plain[n], noise=noise, what=f"the gradient of {n}")


def test_lora_linear_gradcheck():
    inputs = {n: t.double() for n, t in linear_inputs("fp32", 5, 12, 9, 3).items()}
    leaf = [inputs[n].requires_grad_() for n in ("x", "A", "B", "bias")]
    with lk.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, A, B, bias: lk.lora_linear(x, inputs["weight"], A, B, scaling=0.7, bias=bias), leaf
        )


@pytest.mark.parametrize("wanted", (("x",), ("A",), ("B",), ("bias",), ("A", "B"), ("x", "B")))
def test_lora_linear_frozen(wanted, backend):
    inputs = linear_inputs("fp32", 9, 64, 48, 8)
    dy = torch.randn(9, 48)

    def run(names):
        values = {n: t.clone().requires_grad_(n in names) for n, t in inputs.items()}
        lk.lora_linear(**values).backward(dy)
        return {n: t.grad for n, t in values.items()}

    full, some = run(("x", "A", "B", "bias")), run(wanted)
    for n in inputs:
        assert bitwise_equal(some[n], full[n]) if n in wanted else some[n] is None
