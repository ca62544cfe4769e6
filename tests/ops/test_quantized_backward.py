"""Gradients of `quantized` against those of the float64 oracle; what is kept and allocated for them."""

import itertools

import pytest
import torch
from judging import judge
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.ops import _dispatch, _quantized_panels
from lora_kernels.testing import (
    QUANTIZED_DTYPES,
    Dtypes,
    bitwise_equal,
    quantized_expected,
    quantized_gradients,
    quantized_leaves,
    quantized_name,
    quantized_samples,
    quantized_upstream,
    quantized_weight,
    threads,
)

FP64 = Dtypes(torch.float64, torch.float64, torch.float64)


def samples(name, *traits, without=()):
    found = quantized_samples(*QUANTIZED_DTYPES[name])
    return [s for s in found if s.traits >= set(traits) and not s.traits & set(without)]


def named(name, dtypes="fp32"):
    (sample,) = (s for s in samples(dtypes) if s.name == name)
    return sample


def results(sample, count=1):
    a = sample.make(0)
    with threads(count):
        return quantized_gradients(getattr(lk, quantized_name(a)), a, quantized_upstream(a))


def check(sample, count=1):
    """The value and every gradient of a sample within the rule, made with ``count`` threads."""
    leaves = {f"d{name}": t for name, t in quantized_leaves(sample.make(0)).items()}
    for name, got in results(sample, count).items():
        assert got.dtype == leaves.get(name, leaves["dx"]).dtype
        judge(got, *quantized_expected(sample)[name], f"{name} of {sample.name}")


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_reference(name):
    with lk.backend("reference"):
        for sample in samples(name):
            check(sample)


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_every_instruction_set(name, isa):
    for sample in samples(name, without=("large",)):
        check(sample)


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_large(name, isa):
    for sample in samples(name, "large"):
        check(sample)


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_several_panels(name, cpu_backend, monkeypatch):
    """Products by torch over parts of a weight, as few columns of dx at a time as there may be."""
    monkeypatch.setattr(_quantized_panels, "PANEL", 1)
    for sample in samples(name, without=("large",)):
        check(sample)


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_two_threads(name, cpu_backend):
    for sample in samples(name):
        check(sample, 2)


GRADCHECK = [s for s in quantized_samples(*FP64) if not s.traits & {"large"} and s.name != "x-expanded"]


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.name) for s in GRADCHECK])
def test_gradcheck(sample):
    a = sample.make(0)
    leaves = quantized_leaves(a)
    names = [name for name, t in leaves.items() if t.numel()]

    def call(*tensors):
        new = {**leaves, **dict(zip(names, tensors, strict=True))}
        b = {**a, **{name: t for name, t in new.items() if name in a}}
        for name in ("A", "B"):
            parts = [t for n, t in new.items() if n.startswith(f"{name}[")]
            b |= {name: type(a[name])(parts)} if parts else {}
        return getattr(lk, quantized_name(a))(**b)

    inputs = [leaves[name].requires_grad_() for name in names]
    with lk.backend("reference"):
        if a["x"].numel():
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        else:
            assert call(*inputs).numel() == 0


NAMED = ("m17", "m65", "m5", "m129-int8", "order-dropout", "order", "x-transposed", "m65-multi", "gate-up-live-ranks",
         "mixture-of-3", "packed", "listed", "order-multi")  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtypes", ("fp32", "bf16", "bf16-masters"))
def test_any_subset_may_be_frozen(name, dtypes, backend):
    """What does not require grad gets none, and the others' gradients keep their bits."""
    sample = named(name, dtypes)
    full = results(sample)
    leaves = list(quantized_leaves(sample.make(0)))
    for wanted in (*itertools.combinations(leaves, 1), *itertools.combinations(leaves[:4], 2)):
        a = sample.make(0)
        inputs = quantized_leaves(a)
        for n in wanted:
            inputs[n].requires_grad_()
        y = getattr(lk, quantized_name(a))(**a)
        y.backward(quantized_upstream(a))
        for n, t in inputs.items():
            if n in wanted:
                assert bitwise_equal(t.grad, full[f"d{n}"]), f"{n} of {wanted}"
            else:
                assert t.grad is None


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtypes", ("fp32", "bf16-masters"))
def test_twice_the_same_bits_and_inputs_untouched(name, dtypes, backend):
    sample = named(name, dtypes)
    for count in (1, 2) if backend == "cpu" else (1,):
        with threads(count):
            a = sample.make(0)
            tensors = [t for t in (*a.values(), *a["weight"].packed) if isinstance(t, torch.Tensor)]
            before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
            leaves = [t.requires_grad_() for t in quantized_leaves(a).values()]
            y, dy = getattr(lk, quantized_name(a))(**a), quantized_upstream(a)
            first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
            second = torch.autograd.grad(y, leaves, dy)
            _, *again = results(sample, count).values()
        for p, q, r in zip(first, second, again, strict=True):
            assert bitwise_equal(p, q)
            assert bitwise_equal(p, r)
        assert all(bitwise_equal(t, b) for t, b in zip(tensors, before, strict=True))
        assert [t._version for t in tensors] == versions


@pytest.mark.parametrize("name", ("m17", "m65", "m129-int8", "order", "3d", "m65-multi"))
def test_gradients_of_strided_and_expanded_dy(name, backend):
    """dy comes in any layout: of a sum it is one number expanded."""
    sample = named(name)
    function = getattr(lk, quantized_name(sample.make(0)))
    dy = quantized_upstream(sample.make(0))
    wide = torch.full((*dy.shape[:-1], 2 * dy.shape[-1]), float("nan"))[..., ::2].copy_(dy)
    swapped = dy.transpose(0, 1).contiguous().transpose(0, 1)
    ones = torch.ones(()).expand(dy.shape)
    for other in (wide, swapped, ones):
        want = quantized_gradients(function, sample.make(0), other.contiguous())
        for n, t in quantized_gradients(function, sample.make(0), other).items():
            torch.testing.assert_close(t, want[n], rtol=1e-5, atol=1e-5)


M, K, N, R = 70, 48, 40, 4


def make(dtype=torch.float32, factors=None, **options):
    """x, weight, A, B and bias of a small layer."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (M, K), "A": (R, K), "B": (N, R), "bias": (N,)}
    a = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    if factors is not None:
        a |= {"A": a["A"].to(factors), "B": a["B"].to(factors)}
    return {**a, "weight": quantized_weight(N, K, "nf4", 16, generator=generator, **options)}


def dropped(a, **options):
    return lk.quantized_lora_linear(**a, dropout=0.5, training=True, **options)


def saved(wanted, a, **options):
    """(the arguments among what is saved, the bytes of the rest) of a call in which ``wanted`` require grad."""
    kept = []
    a = {n: t.clone().requires_grad_(n in wanted) if isinstance(t, torch.Tensor) else t for n, t in a.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        lk.quantized_lora_linear(**a, **options)
    weight = a["weight"]
    names = {t.data_ptr(): n for n, t in a.items() if n != "weight"}
    names |= {t.data_ptr(): "weight" for t in (*weight.packed[:4], weight.order) if t is not None}
    others = sum(t.nbytes for t in kept if t.data_ptr() not in names)
    return {names.get(t.data_ptr()) for t in kept} - {None}, others


@pytest.mark.parametrize("factors", (torch.bfloat16, torch.float32), ids=("bf16", "masters"))
@pytest.mark.parametrize("order", (False, True), ids=("", "order"))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_saves_what_a_gradient_asks_for(dropout, order, factors, backend):
    a, options = make(torch.bfloat16, factors, order=order), {"dropout": dropout, "training": True}
    v, seed = M * R * 4, 8 if dropout else 0
    for wanted, arguments, most in (
        (("x", "A", "B", "bias"), {"x", "weight", "A", "B"}, v + seed),
        (("A", "B"), {"x", "A", "B"}, v + seed),
        (("A",), {"x", "A", "B"}, seed),
        (("B",), {"B"}, v + seed),
        (("x",), {"weight", "A", "B"}, seed),
        (("bias",), set(), seed),
    ):
        names, others = saved(wanted, a, **options)
        assert names <= arguments, wanted
        assert others <= most, wanted
        assert ("x" in names) == ("A" in wanted)
        assert ("weight" in names) == ("x" in wanted)


def allocated(step):
    """The bytes of every allocation that a step makes, in Python and in C++."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize("fmt", ("nf4", "int8"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (1, 64))
def test_never_unpacks_the_weight(rows, dtype, fmt, monkeypatch):
    """Forward and backward of 1024 x 1024: what is allocated, together, is never half of the weight in x's dtype."""
    monkeypatch.setattr(_quantized_panels, "PANEL", 2**17)
    size = 1024
    weight = quantized_weight(size, size, fmt)
    x, A, B = torch.randn(rows, size).to(dtype), torch.randn(8, size), torch.randn(size, 8)
    leaves, dy = [t.requires_grad_() for t in (x, A, B)], torch.randn(rows, size).to(dtype)

    def step():
        torch.autograd.grad(lk.quantized_lora_linear(x, weight, A, B), leaves, dy)

    def most(backend):
        with lk.backend(backend):
            step()  # what the first call alone allocates
            return max(itertools.accumulate(allocated(step)))

    whole = size * size * dtype.itemsize
    assert most("reference") >= whole
    if _dispatch.extension_error is None:
        assert most("cpu") < whole // 2


def test_a_seed_is_drawn_from_the_generator(route):
    """Once a call, and only where something is dropped; torch.manual_seed gives it again."""
    a = make()
    torch.manual_seed(3)
    y = dropped(a)
    after, other = torch.get_rng_state(), dropped(a)
    torch.manual_seed(3)
    torch.randint(2**63 - 1, (1,))
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert bitwise_equal(dropped(a), y)
    assert not torch.equal(other, y)
    before = torch.get_rng_state()
    for options in (
        {"dropout": 0.5}, {"dropout": 0.0, "training": True}, {"dropout": 0.5, "training": True, "seed": 4},
        {"dropout": 0.5, "training": True, "seed": torch.tensor([4])},
    ):  # fmt: skip
        lk.quantized_lora_linear(**a, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_forms_of_a_seed(route):
    a = make()
    y = dropped(a, seed=2**40 + 1)
    for seed in (torch.tensor([2**40 + 1]), torch.tensor(2**40 + 1), torch.tensor([[2**40 + 1]])):
        assert bitwise_equal(dropped(a, seed=seed), y)
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 2**40 + 1 - 2**32):
        assert not torch.equal(dropped(a, seed=seed), y)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_checkpointing_gives_the_same_bits(reentrant, dtype, route):
    """Two layers with dropout: the backward pass runs the forward again with the masks it had."""
    a, back = make(dtype, torch.float32), quantized_weight(K, N, "int4", 8, offsets=True)
    factors = [a["A"], a["B"], torch.randn(R, N), torch.randn(K, R)]

    def layers(x, A, B, C, D):
        y = dropped({"x": x, "weight": a["weight"], "A": A, "B": B})
        return dropped({"x": torch.nn.functional.gelu(y), "weight": back, "A": C, "B": D})

    def run(call):
        torch.manual_seed(5)
        leaves = [t.clone().requires_grad_() for t in (a["x"], *factors)]
        y = call(*leaves)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(t.grad for t in leaves)]

    plain = run(layers)
    for p, q in zip(plain, run(lambda *leaves: checkpoint(layers, *leaves, use_reentrant=reentrant)), strict=True):
        assert bitwise_equal(p, q)
        assert p.abs().max() > 0


def test_the_backward_pass_advances_no_generator(backend):
    a = make()
    a["A"].requires_grad_()
    y = dropped(a)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ("x", "A", "B", "codes", "scales", "offsets", "table", "order"))
def test_saved_tensors_are_guarded(name, backend):
    a = make(offsets=True, order=True)
    changed = a[name] if name in a else getattr(a["weight"], name)
    for n in ("x", "A", "B"):
        a[n].requires_grad_()
    y = lk.quantized_lora_linear(**a)
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_that_is_overwritten(backend):
    """No gradient is read off y."""
    wanted = ("x", "A", "B", "bias")

    def run(change):
        a = make()
        leaves = [a[n].requires_grad_() for n in wanted]
        y = lk.quantized_lora_linear(**a)
        return torch.autograd.grad((y.mul_(2) if change else y * 2).sum(), leaves)

    for p, q in zip(run(True), run(False), strict=True):
        assert bitwise_equal(p, q)


def test_no_second_derivative(backend):
    a = make()
    x = a["x"].requires_grad_()
    for y in (lk.quantized_lora_linear(**a), lk.quantized_linear(x, a["weight"])):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_a_backend_holds_for_the_backward_pass():
    """What the forward was forced to, the backward takes, outside the block too."""
    wanted, found = ("x", "A", "B"), []
    for inside in (True, False):
        a = make(torch.bfloat16)
        leaves = [a[n].requires_grad_() for n in wanted]
        with lk.backend("reference"):
            y = dropped(a, seed=3)
            if inside:
                found.append(torch.autograd.grad(y.sum(), leaves))
        if not inside:
            found.append(torch.autograd.grad(y.sum(), leaves))
    for p, q in zip(*found, strict=True):
        assert bitwise_equal(p, q)


def test_inputs_made_in_inference_mode(route):
    with torch.inference_mode():
        a = make()
    leaves = {n: t.clone() for n, t in a.items() if n != "weight"}
    leaves["A"].requires_grad_()
    lk.quantized_lora_linear(weight=make()["weight"], **leaves).sum().backward()
    assert leaves["A"].grad.abs().max() > 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_x_is_saved_itself(dtype, backend):
    """Not a view or a copy of it: layers that share x share what they save."""
    a, kept = make(dtype), []
    x = a.pop("x").view(7, 10, K)
    a["A"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        lk.quantized_lora_linear(x, **a)
    assert [t.shape for t in kept if t.data_ptr() == x.data_ptr()] == [x.shape]
