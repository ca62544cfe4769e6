"""What `lora_linear` keeps for the backward pass, its seed, and how it stands with the rest of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.ops import _dispatch
from lora_kernels.ops.lora_linear import row_norms_sq
from lora_kernels.testing import (
    LORA_LINEAR_DTYPES,
    bitwise_equal,
    lora_linear_gradients,
    lora_linear_samples,
    lora_linear_upstream,
)

M, K, N, R = 70, 48, 40, 4


def make(dtype=torch.float32, factors=None, M=M):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": random(M, K).to(dtype),
        "weight": (random(N, K) / K**0.5).to(dtype),
        "A": (random(R, K) / K**0.5).to(factors or dtype),
        "B": random(N, R).to(factors or dtype),
        "bias": random(N).to(dtype),
        "magnitude": (1 + torch.rand(N, generator=generator)).to(factors or dtype),
    }


def saved(wanted, inputs, **options):
    """(y, what is saved and is neither an argument nor y) of a call in which ``wanted`` require grad."""
    kept = []
    values = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = lk.lora_linear(**values, **options)
    pointers = {t.data_ptr(): n for n, t in {**values, "y": y}.items()}
    named = {pointers.get(t.data_ptr()) for t in kept}
    return named - {None}, [t for t in kept if t.data_ptr() not in pointers]


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


LORA = ("x", "weight", "A", "B", "bias")


def lora(**changes):
    inputs = make(**changes)
    return {n: inputs[n] for n in LORA}


@pytest.mark.parametrize("factors", (torch.bfloat16, torch.float32), ids=("bf16", "masters"))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_lora_saves_what_a_gradient_asks_for(dropout, factors, backend):
    inputs, options = lora(dtype=torch.bfloat16, factors=factors), {"dropout": dropout, "training": True}
    seed = 8 if dropout else 0
    for wanted, arguments, most in (
        (("x", "A", "B", "bias"), {"x", "weight", "A", "B"}, M * R * 4 + seed),
        (("A", "B"), {"x", "A", "B"}, M * R * 4 + seed),
        (("A",), {"x", "A", "B"}, seed),
        (("B",), {"B"}, M * R * 4 + seed),
        (("x",), {"weight", "A", "B"}, seed),
        (("x", "B"), {"weight", "A", "B"}, M * R * 4 + seed),
        (("bias",), set(), seed),
    ):
        names, others = saved(wanted, inputs, **options)
        assert names <= arguments, wanted
        assert size(others) <= most, wanted
        assert ("x" in names) == ("A" in wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_dora_saves_no_copy_of_an_activation(dropout, dtype, backend):
    inputs, options = make(dtype=dtype, factors=torch.float32), {"dropout": dropout, "training": True}
    for bias in (True, False):
        if not bias:
            del inputs["bias"]
        for wanted in (("x", "A", "B", "magnitude"), ("A", "B", "magnitude"), ("magnitude",), ("B",), ("A",), ("x",)):
            names, others = saved(wanted, inputs, **options)
            # v, the norms and the seed
            assert size(others) <= M * R * 4 + N * 4 + 8, wanted
            assert all(t.numel() < M * min(N, K) for t in others)
            read_off_y = not dropout and (dtype == torch.float32 or not bias) and "magnitude" in wanted
            assert ("y" in names) == read_off_y
            again = "magnitude" in wanted and not read_off_y
            assert ("x" in names) == ("A" in wanted or again)


def test_x_is_saved_itself(backend):
    """Not a view or a copy of it: layers that share x share what they save."""
    x = torch.randn(5, 7, K)
    inputs = lora()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        lk.lora_linear(x, inputs["weight"], inputs["A"].requires_grad_(), inputs["B"])
    assert [t.shape for t in kept if t.data_ptr() == x.data_ptr()] == [x.shape]


def dropped(inputs, **options):
    return lk.lora_linear(**inputs, dropout=0.5, training=True, **options)


def test_a_seed_is_drawn_from_the_generator(route):
    """Once a call, and only where something is dropped; torch.manual_seed gives it again."""
    inputs = lora()
    torch.manual_seed(3)
    y = dropped(inputs)
    after = torch.get_rng_state()
    other = dropped(inputs)
    torch.manual_seed(3)
    torch.randint(2**63 - 1, (1,))
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert bitwise_equal(dropped(inputs), y)
    assert not torch.equal(other, y)
    before = torch.get_rng_state()
    for options in (
        {"dropout": 0.5}, {"dropout": 0.0, "training": True}, {"dropout": 2**-18, "training": True},
        {"dropout": 0.5, "training": True, "seed": 4}, {"dropout": 0.5, "training": True, "seed": torch.tensor([4])},
    ):  # fmt: skip
        lk.lora_linear(**inputs, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_forms_of_a_seed(route):
    inputs = lora()
    y = dropped(inputs, seed=2**40 + 1)
    for seed in (torch.tensor([2**40 + 1]), torch.tensor(2**40 + 1), torch.tensor([[2**40 + 1]])):
        assert bitwise_equal(dropped(inputs, seed=seed), y)
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 2**40 + 1 - 2**32):
        assert not torch.equal(dropped(inputs, seed=seed), y)


@pytest.mark.skipif(_dispatch.extension is None, reason="needs the compiled extension")
def test_one_seed_in_all_backends():
    inputs = make()
    for magnitude in (inputs.pop("magnitude"), None):
        results = []
        for name in ("reference", "cpu"):
            with lk.backend(name):
                results.append(dropped(inputs, seed=3, magnitude=magnitude))
        for y in results[1:]:
            torch.testing.assert_close(y, results[0])


@pytest.mark.parametrize("magnitude", (False, True))
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_checkpointing_gives_the_same_bits(magnitude, reentrant, dtype, route):
    """Two layers with dropout: the backward pass runs the forward again with the masks it had."""
    inputs = make(dtype, torch.float32)
    weights = [inputs["weight"], (torch.randn(K, N) / N**0.5).to(dtype)]
    factors = [inputs["A"], inputs["B"], torch.randn(R, N) / N**0.5, torch.randn(K, R)]
    m = [inputs["magnitude"], torch.rand(K) + 1]

    def layers(x, *leaves):
        A, B, C, D, *m = leaves
        m = m or (None, None)
        y = lk.lora_linear(x, weights[0], A, B, dropout=0.3, training=True, magnitude=m[0])
        return lk.lora_linear(F.gelu(y), weights[1], C, D, dropout=0.3, training=True, magnitude=m[1])

    def run(call):
        torch.manual_seed(5)
        leaves = [t.clone().requires_grad_() for t in (inputs["x"], *factors, *(m if magnitude else ()))]
        y = call(*leaves)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(t.grad for t in leaves)]

    plain = run(layers)
    for p, q in zip(plain, run(lambda *leaves: checkpoint(layers, *leaves, use_reentrant=reentrant)), strict=True):
        assert bitwise_equal(p, q)
        assert p.abs().max() > 0


def test_the_backward_pass_advances_no_generator(backend):
    inputs = lora()
    inputs["A"].requires_grad_()
    y = dropped(inputs)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dora_output_that_is_overwritten(backend):
    """Where dm is read off y, torch refuses; where it is not, the gradients are right."""
    inputs = make()
    del inputs["bias"]

    def run(change, wanted, **options):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
        y = lk.lora_linear(**leaves, **options)
        (y.mul_(2) if change else y * 2).sum().backward()
        return [leaves[n].grad for n in wanted]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(True, ("x", "magnitude"))
    for wanted, options in (
        (("x", "A", "B"), {}),
        (("x", "A", "B", "magnitude"), {"dropout": 0.5, "training": True, "seed": 1}),
    ):
        for p, q in zip(run(True, wanted, **options), run(False, wanted, **options), strict=True):
            assert bitwise_equal(p, q)
    del inputs["magnitude"]
    for p, q in zip(run(True, ("x", "A", "B")), run(False, ("x", "A", "B")), strict=True):
        assert bitwise_equal(p, q)


def test_saved_tensors_are_guarded(backend):
    for name in ("x", "A", "B", "magnitude", "weight"):
        inputs = make()
        for n in ("x", "A", "B", "magnitude"):
            inputs[n].requires_grad_()
        y = lk.lora_linear(**inputs)
        with torch.no_grad():
            inputs[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_no_second_derivative(backend):
    for magnitude in (True, False):
        inputs = make()
        if not magnitude:
            del inputs["magnitude"]
        x = inputs["x"].requires_grad_()
        (dx,) = torch.autograd.grad(lk.lora_linear(**inputs).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_a_backend_holds_for_the_backward_pass():
    """What the forward was forced to, the backward takes, outside the block too."""
    results = []
    for name in ("reference", None):
        leaves = {n: t.clone().requires_grad_(n in ("A", "B")) for n, t in lora(dtype=torch.bfloat16).items()}
        with lk.backend("reference"):
            y = dropped(leaves, seed=3)
            if name:
                y.sum().backward()
        if not name:
            y.sum().backward()
        results.append((leaves["A"].grad, leaves["B"].grad))
    for p, q in zip(*results, strict=True):
        assert bitwise_equal(p, q)


@pytest.mark.parametrize("name", LORA_LINEAR_DTYPES)
@pytest.mark.parametrize("sample", ("m17", "every-scale", "dora-bias", "dora-dropout", "vector"))
def test_autocast(name, sample, route):
    """x and the weight are cast as for torch's linear; masters keep their precision, gradients their dtype."""
    (sample,) = (s for s in lora_linear_samples(*LORA_LINEAR_DTYPES[name]) if s.name == sample)
    a, b = sample.make(0), sample.make(0)
    b = {n: t.bfloat16() if isinstance(t, torch.Tensor) and t.dtype != torch.float32 else t for n, t in b.items()}
    b |= {"x": b["x"].bfloat16(), "weight": b["weight"].bfloat16()}
    dy = lora_linear_upstream(b)
    want = lora_linear_gradients(lk.lora_linear, b, dy)

    def call(**a):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lk.lora_linear(**a)

    for n, t in lora_linear_gradients(call, a, dy).items():
        assert t.dtype == (torch.bfloat16 if n == "y" else a[n[1:]].dtype)
        assert bitwise_equal(t, want[n].to(t.dtype)), n
    with torch.no_grad():
        assert bitwise_equal(call(**a), lk.lora_linear(**b))


def test_compiled_under_autocast():
    torch._dynamo.reset()
    inputs = make()

    def step(A):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lk.lora_linear(**{**inputs, "A": A})

    A = inputs["A"].clone().requires_grad_()
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(A)
    want = step(A)
    assert bitwise_equal(y, want)
    for p, q in zip(*(torch.autograd.grad(t.float().square().sum(), A) for t in (y, want)), strict=True):
        torch.testing.assert_close(p, q)


def test_inference_mode(route):
    inputs = make()
    want = lk.lora_linear(**inputs)
    for t in inputs.values():
        t.requires_grad_(t is not inputs["weight"])
    with torch.inference_mode():
        assert bitwise_equal(lk.lora_linear(**inputs), want)
        dropped(inputs)
    with torch.no_grad():
        y = lk.lora_linear(**inputs, weight_norm_sq=row_norms_sq(inputs["weight"]))
    assert bitwise_equal(y, want)
    assert not y.requires_grad


def test_inputs_made_in_inference_mode(route):
    with torch.inference_mode():
        inputs = make()
    leaves = {n: t.clone() for n, t in inputs.items()}
    leaves["A"].requires_grad_()
    lk.lora_linear(**leaves).sum().backward()
    assert leaves["A"].grad.abs().max() > 0
