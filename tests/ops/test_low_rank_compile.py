"""What torch must know of the ops: schema, fake, FLOPs, torch.compile without a recompile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.ops import _low_rank as ops
from lora_kernels.ops._dispatch import Op
from lora_kernels.plan import BatchPlan, lora_plan_
from lora_kernels.testing import LOW_RANK_DTYPES, adapter_count, as_segments, bitwise_equal, low_rank_samples

SAMPLES = [s for name in ("fp32", "bf16-masters") for s in low_rank_samples(*LOW_RANK_DTYPES[name])]
#: One sample a kind: opcheck's tracing of every argument's size is slow.
TRACED = ("m17", "qkv", "listed-live-ranks", "mixture-of-2", "strided", "no-rows")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def op_calls(sample):
    """{op: its arguments} in a call of a sample."""
    a = sample.make(0)
    A, B = ((f,) if isinstance(f, torch.Tensor) else tuple(f) for f in (a["A"], a["B"]))
    ids, ranks, weights = a["adapter_ids"], a["ranks"], a["weights"]
    scaling, scale = (a["scaling"], 1.0) if isinstance(a["scaling"], torch.Tensor) else (None, a["scaling"] or 1.0)
    shared = scaling if scaling is None or scaling.dim() == 1 else scaling[0]
    pairs, L = ids.numel(), adapter_count(A)
    v = torch.randn(len(A) if A[0].dim() == 3 else 1, pairs, max(t.shape[-2] for t in A))
    table, plan = torch.zeros(2, 3 + L + pairs, dtype=torch.int32)
    lora_plan_(plan, ids, None, L)
    yield lora_plan_, (table, ids, None, L)
    yield ops.lora_add_, (a["y"], a["x"], A, B, ids, None, None, scaling, ranks, weights, scale)
    yield ops.lora_shrink, (a["x"], A, ids, None, None, ranks, pairs)
    yield ops.lora_expand_, (a["y"], v, B, ids, None, None, scaling, ranks, weights, scale)
    yield ops.lora_outer, (v[0], a["x"], L, ids, None, None, shared, weights, scale, pairs)
    dy = torch.randn(a["y"].shape).to(a["x"].dtype)
    W = torch.randn(dy.shape[-1], a["x"].shape[-1]).to(dy.dtype)
    for weight, need in ((None, (True, True, True, True)), (W, (True, False, False, True))):
        yield ops.lora_grads, (dy, a["x"], weight, A, B, v, plan, scaling, ranks, weights, scale, *need)


def test_every_op_has_a_call():
    assert {op.name for op, _ in op_calls(SAMPLES[0])} == {
        op.name for op in Op.registry.values() if op.family == "low_rank"
    }


@pytest.mark.parametrize("sample", [pytest.param(s, id=f"{i}-{s.name}") for i, s in enumerate(SAMPLES)])
def test_opcheck(sample):
    for op, args in op_calls(sample):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.overload, args, test_utils=checks)


def check_traced(sample):
    for op, args in op_calls(sample):
        torch.library.opcheck(op.overload, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    "sample", [pytest.param(s, id=s.name) for s in SAMPLES[: len(SAMPLES) // 2] if s.name in TRACED]
)
def test_opcheck_traced(sample):
    check_traced(sample)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sample", [pytest.param(s, id=f"{i}-{s.name}") for i, s in enumerate(SAMPLES) if "nan" not in s.traits]
)
def test_opcheck_traced_everywhere(sample):
    check_traced(sample)


def counted(function):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


A, B = torch.randn(3, 8, 40), torch.randn(3, 24, 8)
IDS = torch.tensor([0, 2, -1, 1, 1, 0, 2, 2, 0, -1, 1, 1])


def rows(n):
    return torch.randn(n, 40), IDS.repeat(2)[:n]


def test_compiled_bgmv_sees_any_number_of_rows():
    function, counter = counted(lambda y, x, ids: lk.bgmv(y, x, A, B, ids, scaling=0.5) * 2)
    graphs = []
    for n in (4, 7, 9, 12, 5, 23):
        x, ids = rows(n)
        y = torch.randn(n, 24)
        written = y.clone()
        got = function(written, x, ids)
        lk.bgmv(y, x, A, B, ids, scaling=0.5)
        torch.testing.assert_close(written, y)
        torch.testing.assert_close(got, y * 2)
        graphs.append(counter.frame_count)
    assert graphs[0] == 1
    assert len(set(graphs[1:])) == 1, f"compiled again: {graphs}"


@pytest.mark.parametrize("form", ("ids", "plan", "segments", "slices", "listed"))
def test_compiled_forward_by_every_form(form):
    x, ids = rows(12)
    plan, segments = BatchPlan.from_ids(ids, 3), as_segments(ids)
    A2, B2 = (A, A.flip(0)), (B, B.flip(0))
    functions = {
        "ids": lambda x: lk.multi_lora(x, A, B, ids, ranks=torch.tensor([8, 0, 3], dtype=torch.int32)),
        "plan": lambda x: lk.multi_lora(x, A, B, plan, scaling=torch.ones(3)),
        "segments": lambda x: lk.sgmv(torch.zeros(12, 24), x, A, B, *segments),
        "slices": lambda x: lk.multi_lora(x, A2, B2, ids),
        "listed": lambda x: lk.multi_lora(x, list(A), list(B), ids),
    }
    function, counter = counted(functions[form])
    torch.testing.assert_close(function(x), functions[form](x))
    assert counter.frame_count == 1


def test_compiled_multi_lora_trains_at_any_number_of_rows():
    function, counter = counted(lambda x, a, b, ids: lk.multi_lora(x, a, b, ids, scaling=0.5).square().sum())
    graphs = []
    for n in (6, 9, 12, 7, 20):
        x, ids = rows(n)
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        got = torch.autograd.grad(function(*leaves, ids), leaves)
        want = torch.autograd.grad(lk.multi_lora(*leaves, ids, scaling=0.5).square().sum(), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        graphs.append(counter.frame_count)
    assert graphs[0] == 1
    assert len(set(graphs[1:])) == 1, f"compiled again: {graphs}"


def test_compiled_lora_linear_trains_at_any_number_of_rows():
    W, bias = torch.randn(24, 40), torch.randn(24)
    function, counter = counted(lambda x, a, b: lk.lora_linear(x, W, a, b, scaling=2.0, bias=bias).square().sum())
    for n in (6, 9, 12, 7):
        x = torch.randn(n, 40)
        torch._dynamo.mark_dynamic(x, 0)
        leaves = [t.clone().requires_grad_() for t in (A[0], B[0])]
        got = torch.autograd.grad(function(x, *leaves), leaves)
        want = torch.autograd.grad(lk.lora_linear(x, W, *leaves, scaling=2.0, bias=bias).square().sum(), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor():
    W = torch.randn(24, 40)

    def step(x, a, b, ids):
        y = lk.lora_linear(torch.relu(x), W, a[0], b[0])
        return lk.multi_lora(x, a, b, ids, y=y).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    for n in (6, 9, 12):
        x, ids = rows(n)
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        got = torch.autograd.grad(compiled(*leaves, ids), leaves)
        want = torch.autograd.grad(step(*leaves, ids), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


M, K, N, R = 12, 40, 24, 8


def test_flops_of_one_adapter_a_row():
    x, ids = rows(M)
    y, v = torch.zeros(M, N), torch.randn(1, M, R)
    shrink, expand = 2 * M * R * K, 2 * M * R * N
    assert flops(lambda: lk.bgmv(y, x, A, B, ids)) == shrink + expand
    assert flops(lambda: lk.sgmv(y, x, A, B, *as_segments(ids))) == shrink + expand
    assert flops(lambda: lk.bgmv_shrink(x, A, ids)) == shrink
    assert flops(lambda: lk.bgmv_expand(y, v, B, ids)) == expand
    assert flops(lambda: lk.multi_lora(x, A, B, ids)) == shrink + expand
    assert flops(lambda: lk.multi_lora(x.view(3, 4, K), list(A), list(B), ids)) == shrink + expand


def test_flops_of_slices_and_mixtures():
    x, ids = rows(M)
    slices = (A, A), (B, torch.randn(3, 5, R))
    assert flops(lambda: lk.multi_lora(x, *slices, ids)) == 2 * M * R * (2 * K + N + 5)
    assert flops(lambda: lk.bgmv_shrink(x, slices[0], ids)) == 2 * M * R * 2 * K
    pairs, weights = IDS[:, None].repeat(1, 3), torch.ones(M, 3)
    assert flops(lambda: lk.multi_lora(x, A, B, pairs, weights=weights)) == 3 * 2 * M * R * (K + N)


def test_flops_of_training():
    """Backward does what forward does twice over, less the dx of a frozen x."""
    x, ids = rows(M)
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    shrink, expand = 2 * M * R * K, 2 * M * R * N
    both = shrink + expand
    assert flops(lambda: lk.multi_lora(x.requires_grad_(), a, b, ids).sum().backward()) == 3 * both
    assert flops(lambda: lk.multi_lora(x.detach(), a, b, ids).sum().backward()) == 3 * both - shrink
    W = torch.randn(N, K)
    linear = 2 * M * K * N
    step = flops(lambda: lk.lora_linear(x.detach().requires_grad_(), W, a[0], b[0]).sum().backward())
    assert step == 3 * both + 2 * linear


def test_meta_tensors_have_shapes_only():
    a = SAMPLES[10].make(0)
    meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in a.items()}
    out = lk.multi_lora(**meta)
    assert (out.device.type, out.shape, out.dtype) == ("meta", a["y"].shape, a["y"].dtype)
    assert not bitwise_equal(lk.multi_lora(**a), a["y"])
