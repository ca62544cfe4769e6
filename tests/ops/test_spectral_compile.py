"""What torch must know of the ops of `spectral`: schema, fake, FLOPs, torch.compile without a recompile."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.ops import _spectral as ops
from lora_kernels.ops._dispatch import Op
from lora_kernels.testing import (
    SPECTRAL_DTYPES,
    SPECTRAL_KINDS,
    bitwise_equal,
    spectral_samples,
    spectral_upstream,
)

SAMPLES = [
    s for name in ("fp32", "bf16-masters") for s in spectral_samples(*SPECTRAL_DTYPES[name]) if "large" not in s.traits
]
#: One sample a kind: opcheck's tracing of every argument's size is slow.
TRACED = ("fourier-odd", "dct-3d", "hartley-tall", "identity-no-rows", "wht-base-28", "haar-primes")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def op_calls(sample):
    """Each op with arguments as in a call of a sample."""
    a = sample.make(0)
    x, values, plan, kind, scale, y = (a[n] for n in ("x", "values", "plan", "kind", "scale", "y"))
    dy, (N, K) = spectral_upstream(a), plan.shape
    by_row, by_column = plan.entries(kind)
    of = *plan.hadamard(kind), kind
    yield ops.spectral_linear, (x, values, by_row, y, *of, N, scale)
    for needs in ((True, True), (True, False), (False, True)):
        yield ops.spectral_linear_grads, (dy, x, values, by_row, by_column, *of, scale, *needs)
    for dtype in (torch.float32, torch.float16):
        yield ops.spectral_delta_weight, (values, by_row, *of, N, K, scale, dtype)
    ids = torch.arange(math.prod(x.shape[:-1])) % 3 - 1
    bank = torch.stack((values, -values))
    yield ops.spectral_add_, (torch.zeros(dy.shape, dtype=x.dtype), x, bank, by_row, ids, None, *of, scale)
    yield ops.spectral_weight_grad, (torch.randn(N, K).to(x.dtype), by_row, *of, plan.n, scale)


def test_every_op_has_a_call():
    assert {op.name for op, _ in op_calls(SAMPLES[0])} == {
        op.name for op in Op.registry.values() if op.family == "spectral"
    }


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_opcheck(kind):
    for sample in SAMPLES:
        if kind in sample.traits:
            for op, args in op_calls(sample):
                checks = ("test_schema", "test_autograd_registration", "test_faketensor")
                torch.library.opcheck(op.overload, args, test_utils=checks)


@pytest.mark.parametrize("name", TRACED)
def test_opcheck_traced(name):
    (sample,) = (s for s in SAMPLES[: len(SAMPLES) // 2] if s.name == name)
    for op, args in op_calls(sample):
        torch.library.opcheck(op.overload, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", TRACED)
def test_ops_hold_what_the_functions_do(name):
    """The arguments above are those that the public functions give them."""
    (sample,) = (s for s in SAMPLES[: len(SAMPLES) // 2] if s.name == name)
    a, ((op, args), *_) = sample.make(0), op_calls(sample)
    assert bitwise_equal(op(*args), lk.spectral_linear(**a))


M, K, N, COUNT = 12, 28, 24, 30
SEEN = (6, 9, 12, 7, 23)


def fresh_plan(seed=0, n=COUNT):
    """One that has been used for nothing."""
    places = torch.randperm(N * K, generator=torch.Generator().manual_seed(seed))[:n]
    return lk.SpectralPlan(places // K, places % K, shape=(N, K))


def counted(function):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("used", (False, True))
@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_compiled_sees_any_number_of_rows(kind, used):
    """Without gradients: one graph for all numbers of rows, whether the plan was used before or not."""
    plan, values = fresh_plan(), torch.randn(COUNT)
    if used:
        lk.spectral_linear(torch.randn(1, K), values, plan, kind=kind)
    compiled, counter = counted(lambda x, v, y: lk.spectral_linear(x * 2, v, plan, kind=kind, scale=3.0, y=y) + 1)
    for rows in SEEN:
        x, y = torch.randn(rows, K), torch.randn(rows, N)
        for t in (x, y):
            torch._dynamo.mark_dynamic(t, 0)
        want = lk.spectral_linear(x * 2, values, plan, kind=kind, scale=3.0, y=y) + 1
        torch.testing.assert_close(compiled(x, values, y), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_compiled_trains_at_any_number_of_rows(kind):
    plan = fresh_plan()
    compiled, counter = counted(lambda x, v: lk.spectral_linear(x, v, plan, kind=kind, scale=3.0).square())
    for rows in SEEN:
        x, values = torch.randn(rows, K, requires_grad=True), torch.randn(COUNT, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        results = []
        for call in (compiled, lambda x, v: lk.spectral_linear(x, v, plan, kind=kind, scale=3.0).square()):
            y = call(x, values)
            results.append((y, *torch.autograd.grad(y, (x, values), torch.ones(rows, N))))
        for g, w in zip(*results, strict=True):
            torch.testing.assert_close(g, w)
    assert counter.frame_count == 1


def test_a_dense_plan_has_a_graph_for_either_way():
    """By the rows of x or by ΔW: where that changes with their number there are two graphs, no more."""
    plan, values = fresh_plan(n=N * K), torch.randn(N * K, requires_grad=True)
    compiled, counter = counted(lambda x, v: lk.spectral_linear(x, v, plan, kind="dct"))
    for rows in (2, 3, 300, 5, 301, 4, 17, 400):
        x = torch.randn(rows, K)
        torch._dynamo.mark_dynamic(x, 0)
        got, want = compiled(x, values), lk.spectral_linear(x, values, plan, kind="dct")
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), values)[0] for y in (got, want)))
    assert counter.frame_count <= 2


class Layer(torch.nn.Module):
    def __init__(self, plan, kind):
        super().__init__()
        self.plan, self.kind, self.values = plan, kind, torch.nn.Parameter(torch.randn(plan.n))

    def forward(self, x):
        return lk.spectral_linear(x, self.values, self.plan, kind=self.kind)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_a_new_plan_is_not_the_old_one(kind):
    """LoCA moves its places: the compiled layer sees where they are now, also where as many of them moved."""
    layer, x = Layer(fresh_plan(), kind), torch.randn(5, K)
    compiled, _ = counted(layer)
    seen = []
    for seed in range(4):
        layer.plan = fresh_plan(seed)
        got = compiled(x)
        torch.testing.assert_close(got, layer(x))
        seen.append(got)
    assert not torch.allclose(seen[0], seen[1])
    layer.kind = "identity" if kind == "dct" else "dct"
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_compiled_delta_weight(kind):
    plan, values = fresh_plan(), torch.randn(COUNT, requires_grad=True)
    compiled, counter = counted(lambda v: lk.spectral_delta_weight(v, plan, kind=kind, scale=2.0).square())
    results = []
    for call in (compiled, lambda v: lk.spectral_delta_weight(v, plan, kind=kind, scale=2.0).square()):
        W = call(values)
        results.append((W, torch.autograd.grad(W, values, torch.ones(N, K))[0]))
    for g, w in zip(*results, strict=True):
        torch.testing.assert_close(g, w)
    assert counter.frame_count == 1


def test_compiled_location_grad():
    plan, values = fresh_plan(), torch.randn(COUNT)
    compiled, counter = counted(lambda dy, x, v: lk.spectral_location_grad(dy, x, v, plan, scale=0.1))
    for rows in SEEN:
        x, dy = torch.randn(rows, K), torch.randn(rows, N)
        for t in (x, dy):
            torch._dynamo.mark_dynamic(t, 0)
        want = lk.spectral_location_grad(dy, x, values, plan, scale=0.1)
        for g, w in zip(compiled(dy, x, values), want, strict=True):
            torch.testing.assert_close(g, w)
    assert counter.frame_count == 1


def test_compiled_under_autocast():
    plan, linear = fresh_plan(), torch.nn.Linear(K, N)

    def step(x, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lk.spectral_linear(x, v, plan, kind="haar", y=linear(x))

    compiled, _ = counted(step)
    x, values = torch.randn(M, K, requires_grad=True), torch.randn(COUNT, requires_grad=True)
    y, want = compiled(x, values), step(x, values)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want)
    for p, q in zip(*(torch.autograd.grad(t.float().square().sum(), (x, values)) for t in (y, want)), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.slow
def test_inductor():
    plans = fresh_plan(), lk.SpectralPlan.random(COUNT, (K, N))

    def step(x, v, w):
        y = lk.spectral_linear(torch.relu(x), v, plans[0], kind="wht")
        return lk.spectral_linear(y, w, plans[1], kind="fourier", scale=99.0, y=x).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    for rows in (6, 9, 12):
        leaves = [t.requires_grad_() for t in (torch.randn(rows, K), torch.randn(COUNT), torch.randn(COUNT))]
        got = torch.autograd.grad(compiled(*leaves), leaves)
        for g, w in zip(got, torch.autograd.grad(step(*leaves), leaves), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops():
    """A product and a sum for each entry and row, and each transform once a row: 2.5 n log₂ n for a Fourier's."""
    plan, values = lk.SpectralPlan.random(40, (64, 32)), torch.randn(40)
    of_K, of_N = 2.5 * 32 * 5, 2.5 * 64 * 6
    ends = {
        "fourier": (of_K, of_N), "dct": (of_K, of_N), "hartley": (of_K, of_N), "identity": (0, 0), "haar": (0, 0),
        "wht": (32 * 5, 0),
    }  # fmt: skip
    for kind, (into, out) in ends.items():
        entries = 2 * (len(plan.entries(kind)[0]) - 65) // 2
        assert kind == "fourier" or entries == 2 * 40

        def step(*wanted, kind=kind):
            leaves = {"x": torch.randn(3, 4, 32), "values": values.clone()}
            for name in wanted:
                leaves[name].requires_grad_()
            y = lk.spectral_linear(plan=plan, kind=kind, **leaves)
            if wanted:
                y.sum().backward()

        forward = 12 * (into + out + entries)
        assert flops(step) == forward
        assert flops(lambda s=step: s("x")) == forward + 12 * (into + out + entries)
        assert flops(lambda s=step: s("values")) == forward + 12 * (into + out + entries)
        assert flops(lambda s=step: s("x", "values")) == forward + 12 * (2 * into + out + 2 * entries)


def test_flops_are_far_fewer_than_the_weights():
    size, n = 1024, 1000
    plan, x = lk.SpectralPlan.random(n, (size, size)), torch.randn(8, size)
    count = flops(lambda: lk.spectral_linear(x, torch.randn(n), plan, kind="dct"))
    assert count == 8 * (2 * 2.5 * size * math.log2(size) + 2 * n)
    assert count < 2 * 8 * size * size / 30


def test_fakes_refuse_tensors_of_several_devices():
    sample = next(s for s in SAMPLES if s.name == "wht-base-28")
    for op, args in op_calls(sample):
        for i, t in enumerate(args):
            if isinstance(t, torch.Tensor):
                moved = [*args[:i], t.to("meta"), *args[i + 1 :]]
                with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
                    op(*moved)


def test_an_exported_program_has_the_op():
    plan, values = fresh_plan(), torch.randn(COUNT)

    class Net(torch.nn.Module):
        def forward(self, x, v):
            return lk.spectral_linear(x, v, plan, kind="haar")

    x = torch.randn(3, K)
    program = torch.export.export(Net(), (x, values))
    assert "lora_kernels.spectral_linear" in str(program.graph)
    torch.testing.assert_close(program.module()(x, values), lk.spectral_linear(x, values, plan, kind="haar"))
