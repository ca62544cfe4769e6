"""What torch must know of the ops of `lora_linear`: schema, fake, FLOPs, torch.compile without a recompile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.ops import _lora_linear as ops
from lora_kernels.ops._dispatch import Op
from lora_kernels.testing import LORA_LINEAR_DTYPES, bitwise_equal, lora_linear_samples, lora_linear_upstream

SAMPLES = [
    s
    for name in ("fp32", "bf16-masters")
    for s in lora_linear_samples(*LORA_LINEAR_DTYPES[name])
    if "large" not in s.traits
]
#: One sample a kind: opcheck's tracing of every argument's size is slow.
TRACED = ("m17", "dora-bias", "no-rows")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def op_calls(sample):
    """Each op with arguments as in a call of a sample: with every optional argument, and with none."""
    a = sample.make(0)
    x, A, B, bias = a["x"], a["A"], a["B"], a["bias"]
    y = lora_linear_upstream(a)
    M, N, R = x.shape[:-1].numel(), *B.shape
    seed, p, c = torch.tensor([a["seed"]]), 0.3, torch.rand(N)
    v = torch.randn(M, R)
    yield ops.lora_down, (x, A, None, 0.0)
    yield ops.lora_down, (x, A, seed, p)
    yield ops.lora_forward_, (y.clone(), x, A, B, None, None, None, None, None, 0.0, 0.5)
    yield ops.lora_forward_, (y.clone(), x, A, B, c, y.clone(), c + 1, bias, seed, p, 0.5)
    yield ops.lora_out_grads, (y, v, B, None, None, None, 0.5, True, True)
    yield ops.lora_out_grads, (y, v, B, y.clone(), bias, c, 0.5, True, False)
    yield ops.lora_out_grads, (y, v, B, y.clone(), None, None, 0.5, False, True)
    yield ops.lora_out_grads, (y, v, B, None, None, c, 0.5, False, False)
    yield ops.lora_in_grads_, (torch.zeros_like(x).contiguous(), v, x, A, seed, p, 0.5)
    yield ops.lora_in_grads_, (torch.zeros_like(x).contiguous(), v, None, A, None, 0.0, 0.5)
    yield ops.lora_in_grads_, (x.new_empty(0), v, x, A, seed, p, 0.5)
    yield ops.lora_dropout, (x, seed, p)
    yield ops.lora_weight_norm, (a["weight"], A, B, torch.rand(N).to(x.dtype), 0.5)


def test_every_op_has_a_call():
    assert {op.name for op, _ in op_calls(SAMPLES[0])} == {
        op.name for op in Op.registry.values() if op.family == "lora_linear"
    }


@pytest.mark.parametrize("sample", [pytest.param(s, id=f"{i}-{s.name}") for i, s in enumerate(SAMPLES)])
def test_opcheck(sample):
    for op, args in op_calls(sample):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.overload, args, test_utils=checks)


@pytest.mark.parametrize(
    "sample", [pytest.param(s, id=s.name) for s in SAMPLES[: len(SAMPLES) // 2] if s.name in TRACED]
)
def test_opcheck_traced(sample):
    for op, args in op_calls(sample):
        torch.library.opcheck(op.overload, args, test_utils="test_aot_dispatch_dynamic")


M, K, N, R = 12, 40, 24, 8
W, BIAS = torch.randn(N, K), torch.randn(N)
A, B, MAGNITUDE = torch.randn(R, K), torch.randn(N, R), torch.rand(N) + 1


def counted(function):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


OPTIONS = {
    "plain": {},
    "bias": {"bias": BIAS},
    "dropout": {"dropout": 0.5, "training": True},
    "dora": {"magnitude": MAGNITUDE},
    "dora-dropout-bias": {"magnitude": MAGNITUDE, "dropout": 0.5, "training": True, "bias": BIAS},
    "core": {"core": torch.randn(R, R), "delta_scale": torch.rand(N), "in_scale": torch.rand(K)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("drawn", (False, True))
def test_compiled_trains_at_any_number_of_rows(name, drawn):
    """One graph for all numbers of rows; a seed that is drawn inside gives what it gives without compilation."""
    options = OPTIONS[name]

    def step(x, seed, A, B, m):
        extra = {**options, **({"magnitude": m} if "magnitude" in options else {})}
        return lk.lora_linear(x, W, A, B, scaling=2.0, seed=seed, **extra)

    function, counter = counted(step)
    for n in (6, 9, 12, 7):
        x = torch.randn(n, K)
        torch._dynamo.mark_dynamic(x, 0)
        seed = None if drawn else torch.tensor([n])
        leaves = [t.clone().requires_grad_() for t in (A, B, MAGNITUDE)]
        results = []
        for call in (function, step):
            torch.manual_seed(n)
            y = call(x, seed, *leaves)
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones(n, N), allow_unused=True)))
        for g, w in zip(*results, strict=True):
            torch.testing.assert_close(g, w) if w is not None else None
        assert name != "plain" or results[0][3] is None
    assert counter.frame_count == 1


def test_compiled_needs_no_gradients(route):
    x, seed = torch.randn(M, K), torch.tensor([3])
    for options in OPTIONS.values():
        torch._dynamo.reset()
        function, counter = counted(lambda x, o=options: lk.lora_linear(x, W, A, B, seed=seed, **o))
        torch.testing.assert_close(function(x), lk.lora_linear(x, W, A, B, seed=seed, **options))
        assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor():
    def step(x, a, b, m):
        y = lk.lora_linear(torch.relu(x), W, a, b, dropout=0.5, training=True, seed=torch.tensor([7]))
        return lk.lora_linear(y, W.T.contiguous(), b.T.contiguous(), a.T.contiguous(), magnitude=m).square().sum()

    m = torch.rand(K) + 1
    compiled = torch.compile(step, fullgraph=True)
    for n in (6, 9, 12):
        leaves = [t.clone().requires_grad_() for t in (torch.randn(n, K), A, B, m)]
        got = torch.autograd.grad(compiled(*leaves), leaves)
        for g, w in zip(got, torch.autograd.grad(step(*leaves), leaves), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops(backend):
    """Each product is 2 M R K or 2 M R N, the base's 2 M K N."""
    through_A, through_B, base = 2 * M * R * K, 2 * M * R * N, 2 * M * K * N
    x = torch.randn(3, 4, K)

    def step(options, *wanted):
        values = {"x": x, "A": A, "B": B, "magnitude": options.get("magnitude")}
        leaves = {n: t if t is None else t.detach().clone().requires_grad_(n in wanted) for n, t in values.items()}
        y = lk.lora_linear(weight=W, **{**options, **leaves})
        if wanted:
            y.sum().backward()

    dropout, dora = OPTIONS["dropout"], OPTIONS["dora"]
    norm = 2 * N * R * K + 2 * N * R * R + 2 * R * R * K  # of W Aᵀ, A Aᵀ and B (A Aᵀ)
    forward = base + through_A + through_B
    for options, before in (({}, forward), (dropout, forward), (dora, forward + norm)):
        assert flops(lambda o=options: step(o)) == before
        assert flops(lambda o=options: step(o, "x", "A", "B")) == before + forward + through_A + through_B
        assert flops(lambda o=options: step(o, "A", "B")) == before + through_A + 2 * through_B
        assert flops(lambda o=options: step(o, "A")) == before + through_A + through_B
        assert flops(lambda o=options: step(o, "B")) == before + through_B
        assert flops(lambda o=options: step(o, "x")) == before + forward
    assert flops(lambda: step({**dora, **dropout})) == forward + base + norm


def test_meta_tensors_have_shapes_only():
    for options in OPTIONS.values():
        seed = torch.tensor([3], device="meta")
        meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in options.items()}
        y = lk.lora_linear(*(t.to("meta") for t in (torch.randn(2, 3, K), W, A, B)), seed=seed, **meta)
        assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, N), torch.float32)


def test_fakes_refuse_tensors_of_several_devices():
    x, seed = torch.randn(M, K), torch.tensor([3])
    for op, args in (
        (ops.lora_forward_, (torch.zeros(M, N), x, A.to("meta"), B, None, None, None, None, seed, 0.5, 1.0)),
        (ops.lora_down, (x, A.to("meta"), seed, 0.5)),
        (ops.lora_dropout, (x.to("meta"), seed, 0.5)),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
            op(*args)


def test_the_compiled_seed_is_not_baked_in():
    """Two calls of one graph draw two seeds."""
    function, _ = counted(lambda x: lk.lora_linear(x, W, A, B, dropout=0.5, training=True))
    x = torch.randn(M, K)
    first, second = function(x), function(x)
    assert not bitwise_equal(first, second)
