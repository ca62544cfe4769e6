"""What torch must know of the ops of `quantized`: schema, fake, FLOPs, torch.compile without a recompile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.ops import _quantized as ops
from lora_kernels.ops._dispatch import Op
from lora_kernels.testing import (
    QUANTIZED_DTYPES,
    bitwise_equal,
    quantized_name,
    quantized_samples,
    quantized_upstream,
    quantized_weight,
)

SAMPLES = [
    s
    for name in ("fp32", "bf16-masters")
    for s in quantized_samples(*QUANTIZED_DTYPES[name])
    if "large" not in s.traits
]
#: One sample a kind: opcheck's tracing of every argument's size is slow.
TRACED = ("m17", "m5-multi", "order-alone", "no-rows")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def op_calls(sample):
    """Each op with arguments as in a call of a sample: with every optional argument that it has, and with none."""
    a = sample.make(0)
    x, packed, dy = a["x"], a["weight"].packed, quantized_upstream(a)
    N, K = a["weight"].shape
    yield ops.dequantize_, (torch.empty(N, K, dtype=x.dtype), *packed, 0, 0)
    yield ops.dequantize_, (torch.empty(N - 1, K - 1, dtype=x.dtype), *packed, 1, 1)
    yield ops.quantized_linear, (x, *packed, None, None, [], *[None] * 6, 1.0)
    yield ops.quantized_linear_grad, (dy, *packed, K, None, None, 1.0)
    if "A" not in a:
        return
    A, B = ((f,) if isinstance(f, torch.Tensor) else tuple(f) for f in (a["A"], a["B"]))
    ids, ranks, weights = (a.get(name) for name in ("adapter_ids", "ranks", "weights"))
    scaling, scale = (a["scaling"], 1.0) if isinstance(a["scaling"], torch.Tensor) else (None, a["scaling"] or 1.0)
    pairs = x.shape[:-1].numel() if ids is None else ids.numel()
    v = torch.randn(len(B) if B[0].dim() == 3 else 1, pairs, max(b.shape[-1] for b in B))
    yield ops.quantized_linear, (x, *packed, a["bias"], v, B, ids, None, None, scaling, ranks, weights, scale)
    if ids is None:
        yield ops.quantized_linear_grad, (dy, *packed, K, v[0], A[0], 0.5)
    else:
        plan = lk.BatchPlan.from_ids(ids, len(A) if A[0].dim() == 2 else A[0].shape[0]).table
        yield ops.quantized_linear, (x, *packed, a["bias"], v, B, None, None, plan, scaling, ranks, weights, scale)


def test_every_op_has_a_call():
    sample = next(s for s in SAMPLES if s.name == "m17")
    assert {op.name for op, _ in op_calls(sample)} == {
        op.name for op in Op.registry.values() if op.family == "quantized"
    }


@pytest.mark.parametrize("sample", [pytest.param(s, id=f"{i}-{s.name}") for i, s in enumerate(SAMPLES)])
def test_opcheck(sample):
    for op, args in op_calls(sample):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.overload, args, test_utils=checks)


def check_traced(sample):
    for op, args in op_calls(sample):
        torch.library.opcheck(op.overload, args, test_utils="test_aot_dispatch_dynamic")


HALF = SAMPLES[: len(SAMPLES) // 2]


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.name) for s in HALF if s.name in TRACED])
def test_opcheck_traced(sample):
    check_traced(sample)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [pytest.param(s, id=f"{i}-{s.name}") for i, s in enumerate(SAMPLES)])
def test_opcheck_traced_everywhere(sample):
    check_traced(sample)


M, K, N, R, L = 12, 40, 24, 8, 3
WEIGHTS = {
    "nf4": quantized_weight(N, K, "nf4", 8),
    "int4": quantized_weight(N, K, "int4", 32, offsets=True, order=True),
    "int8": quantized_weight(N, K, "int8", 0),
}
BIAS = torch.randn(N)
A, B = torch.randn(L, R, K), torch.randn(L, N, R)
IDS = torch.tensor([0, 2, -1, 1, 1, 0, 2, 2, 0, -1, 1, 1])


def counted(function):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def functions(weight):
    """Each function of (x, ids, A, B)."""
    return {
        "linear": lambda x, ids, A, B: lk.quantized_linear(x, weight, BIAS),
        "lora": lambda x, ids, A, B: lk.quantized_lora_linear(x, weight, A[0], B[0], scaling=2.0, bias=BIAS),
        "dropout": lambda x, ids, A, B: lk.quantized_lora_linear(
            x, weight, A[0], B[0], dropout=0.5, training=True, seed=torch.tensor([7])
        ),
        "drawn": lambda x, ids, A, B: lk.quantized_lora_linear(x, weight, A[0], B[0], dropout=0.5, training=True),
        "multi": lambda x, ids, A, B: lk.quantized_multi_lora_linear(x, weight, A, B, ids, scaling=0.5, bias=BIAS),
    }


NAMES = tuple(functions(None))


@pytest.mark.parametrize("fmt", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_sees_any_number_of_rows(name, fmt):
    """Without gradients: one graph for all numbers of rows."""
    function = functions(WEIGHTS[fmt])[name]
    compiled, counter = counted(function)
    for n in (6, 9, 12, 7):
        x, ids = torch.randn(n, K), IDS[:n].clone()
        for t in (x, ids):
            torch._dynamo.mark_dynamic(t, 0)
        torch.manual_seed(n)
        got = compiled(x, ids, A, B)
        torch.manual_seed(n)
        torch.testing.assert_close(got, function(x, ids, A, B))
    assert counter.frame_count == 1


@pytest.mark.parametrize("fmt", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_trains_at_any_number_of_rows(name, fmt):
    function = functions(WEIGHTS[fmt])[name]
    compiled, counter = counted(function)
    for n in (6, 9, 12, 7):
        x, ids = torch.randn(n, K, requires_grad=True), IDS[:n].clone()
        for t in (x, ids):
            torch._dynamo.mark_dynamic(t, 0)
        leaves, results = [x] if name == "linear" else [x, A.clone(), B.clone()], []
        for call in (compiled, function):
            torch.manual_seed(n)
            y = call(x, ids, *([t.requires_grad_() for t in leaves[1:]] or (A, B)))
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones(n, N))))
        for g, w in zip(*results, strict=True):
            torch.testing.assert_close(g, w)
    assert counter.frame_count == 1


def test_compiled_dequantize():
    for weight in WEIGHTS.values():
        torch._dynamo.reset()
        compiled, counter = counted(lambda x, weight=weight: x @ lk.dequantize(weight, torch.float32).T)
        x = torch.randn(M, K)
        torch.testing.assert_close(compiled(x), x @ lk.dequantize(weight, torch.float32).T)
        assert counter.frame_count == 1


def test_compiled_under_autocast():
    def step(x, a):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lk.quantized_lora_linear(x, WEIGHTS["nf4"], a, B[0])

    compiled, _ = counted(step)
    x, a = torch.randn(M, K, requires_grad=True), A[0].clone().requires_grad_()
    y, want = compiled(x, a), step(x, a)
    assert y.dtype == torch.bfloat16
    assert bitwise_equal(y, want)
    for p, q in zip(*(torch.autograd.grad(t.float().square().sum(), (x, a)) for t in (y, want)), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("form", ("plan", "slices", "listed", "packed", "mixture"))
def test_compiled_by_every_form(form):
    x, weight = torch.randn(M, K), WEIGHTS["nf4"]
    plan, pairs, share = lk.BatchPlan.from_ids(IDS, L), IDS[:, None].repeat(1, 2), torch.rand(M, 2)
    halves = B.split(N // 2, 1)
    ranks = torch.tensor([8, 0, 3], dtype=torch.int32)
    calls = {
        "plan": lambda x: lk.quantized_multi_lora_linear(x, weight, A, B, plan, scaling=torch.ones(L)),
        "slices": lambda x: lk.quantized_multi_lora_linear(x, weight, (A, A), halves, IDS),
        "listed": lambda x: lk.quantized_multi_lora_linear(x, weight, list(A), list(B), IDS),
        "packed": lambda x: lk.quantized_multi_lora_linear(x, weight, torch.cat([A, A], 1), halves, IDS, ranks=ranks),
        "mixture": lambda x: lk.quantized_multi_lora_linear(x, weight, A, B, pairs, weights=share),
    }
    compiled, counter = counted(calls[form])
    torch.testing.assert_close(compiled(x), calls[form](x))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor():
    weight, back = WEIGHTS["nf4"], quantized_weight(K, N, "int8", 0)

    def step(x, a, b):
        y = lk.quantized_lora_linear(torch.relu(x), weight, a[0], b[0], dropout=0.5, training=True, seed=7)
        return lk.quantized_multi_lora_linear(y, back, b.mT, a.mT, IDS[: len(x)]).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    for n in (6, 9, 12):
        leaves = [t.clone().requires_grad_() for t in (torch.randn(n, K), A, B)]
        got = torch.autograd.grad(compiled(*leaves), leaves)
        for g, w in zip(got, torch.autograd.grad(step(*leaves), leaves), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops(backend):
    """Each product is 2 M K N, 2 M R K or 2 M R N; unpacking counts for nothing, whichever backend does it."""
    base, through_A, through_B = 2 * M * K * N, 2 * M * R * K, 2 * M * R * N
    x, weight = torch.randn(3, 4, K), WEIGHTS["nf4"]

    def step(*wanted, **options):
        values = {"x": x, "A": A[0], "B": B[0]}
        leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in values.items()}
        y = lk.quantized_lora_linear(weight=weight, **leaves, **options)
        if wanted:
            y.sum().backward()

    forward = base + through_A + through_B
    assert flops(lambda: lk.quantized_linear(x, weight, BIAS)) == base
    assert flops(lambda: lk.dequantize(weight)) == 0
    for options in ({}, {"dropout": 0.5, "training": True}):
        assert flops(lambda o=options: step(**o)) == forward
        assert flops(lambda o=options: step("x", "A", "B", **o)) == 2 * forward + through_A + through_B
        assert flops(lambda o=options: step("A", "B", **o)) == forward + through_A + 2 * through_B
        assert flops(lambda o=options: step("B", **o)) == forward + through_B
        assert flops(lambda o=options: step("x", **o)) == 2 * forward


def test_flops_of_many_adapters():
    """Of the ops, whose formulas count a row without an adapter as any other."""
    base, both = 2 * M * K * N, 2 * M * R * (K + N)
    x, weight, halves = torch.randn(M, K), WEIGHTS["nf4"], B.split(N // 2, 1)
    pairs, share = IDS[:, None].repeat(1, 3), torch.rand(M, 3)

    def call(*args, **options):
        return flops(lambda: lk.quantized_multi_lora_linear(x, weight, *args, **options))

    assert call(A, B, IDS) == base + both
    assert call(A, B, lk.BatchPlan.from_ids(IDS, L)) == base + both
    assert call(list(A), list(B), IDS) == base + both
    assert call((A, A), halves, IDS) == base + both + 2 * M * R * K
    assert call(A, B, pairs, weights=share) == base + 3 * both


def test_meta_tensors_have_shapes_only():
    for sample in SAMPLES:
        a = sample.make(0)
        meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in a.items()}
        for n in ("A", "B"):
            if isinstance(a.get(n), (tuple, list)):
                meta[n] = type(a[n])(t.to("meta") for t in a[n])
        meta["weight"] = a["weight"].to("meta")
        y = getattr(lk, quantized_name(a))(**({**meta, "seed": None} if "seed" in meta else meta))
        want = (*a["x"].shape[:-1], a["weight"].shape[0])
        assert (y.device.type, y.shape, y.dtype) == ("meta", want, a["x"].dtype)


def test_fakes_refuse_tensors_of_several_devices():
    weight = WEIGHTS["nf4"]
    x, elsewhere = torch.randn(M, K), weight.to("meta")
    for op, args in (
        (ops.quantized_linear, (x, *elsewhere.packed, None, None, [], *[None] * 6, 1.0)),
        (ops.quantized_linear, (x.to("meta"), *weight.packed, None, None, [], *[None] * 6, 1.0)),
        (ops.quantized_linear_grad, (torch.randn(M, N), *elsewhere.packed, K, None, None, 1.0)),
        (ops.dequantize_, (torch.empty(N, K), *elsewhere.packed, 0, 0)),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
            op(*args)


def test_the_compiled_seed_is_not_baked_in():
    """Two calls of one graph draw two seeds."""
    compiled, _ = counted(functions(WEIGHTS["nf4"])["drawn"])
    x = torch.randn(M, K)
    assert not bitwise_equal(compiled(x, IDS, A, B), compiled(x, IDS, A, B))
