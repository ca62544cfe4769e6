"""The ``low_rank`` family on a GPU, against the float64 oracle, and what only a GPU shows: streams, graphs, devices."""

import functools

import layouts
import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops._low_rank import lora_add_, lora_expand_, lora_shrink
from lora_kernels.plan import lora_plan_
from lora_kernels.testing import (
    LOW_RANK_DTYPES,
    adapter_count,
    as_segments,
    assert_within_rule,
    bitwise_equal,
    low_rank_oracle,
    low_rank_plain,
    low_rank_samples,
    low_rank_terms,
    rms,
    shrink_oracle,
)

SAMPLES = [
    pytest.param(name, sample, id=f"{name}-{sample.name}")
    for name, dtypes in LOW_RANK_DTYPES.items()
    for sample in low_rank_samples(*dtypes)
]


def on_gpu(value):
    """A copy on the GPU with the same strides, a view of a copy of the same base."""
    if isinstance(value, (tuple, list)):
        return type(value)(on_gpu(one) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    base = value if value._base is None else value._base
    return base.cuda().as_strided(value.shape, value.stride(), value.storage_offset())


def make(sample):
    return {name: on_gpu(value) for name, value in sample.make(0).items()}


@functools.cache
def expected(sample):
    a = sample.make(0)
    noise = a["x"].shape[-1] ** 0.5 * 2**-24 * low_rank_terms(**a)
    return low_rank_oracle(**a), low_rank_plain(**a), noise


@pytest.fixture(params=("triton", "cuda"))
def kernels(request):
    """Each of the kernels a GPU has, forced."""
    if request.param not in lora_add_.backends():
        pytest.skip(f"no {request.param} kernels here")
    with lk.backend(request.param):
        yield


def test_kernels_are_what_runs():
    ran = {op.op: op.backend for op in lk.info().ops if op.device == "cuda" and op.family == "low_rank"}
    assert set(ran.values()) <= {"triton", "cuda"}
    assert ran["lora_grads"] == "triton"


@pytest.mark.parametrize("name, sample", SAMPLES)
def test_bgmv(name, sample, kernels):
    a = make(sample)
    outside = a["y"] if a["y"]._base is None else a["y"]._base
    before = outside.clone()
    y = lk.bgmv(**a)
    assert y is a["y"]
    oracle, plain, noise = expected(sample)
    assert_within_rule(y.cpu(), oracle, plain, noise=noise, what=sample.name)
    y.copy_(before.as_strided(y.shape, y.stride(), y.storage_offset()))
    assert bitwise_equal(outside, before), "wrote outside y"


@pytest.mark.parametrize("name, sample", SAMPLES)
def test_forms_agree(name, sample, kernels):
    a = make(sample)
    options = {option: a[option] for option in ("scaling", "ranks")}
    ids, want = a["adapter_ids"], lk.bgmv(**a)
    L = adapter_count(a["A"])
    plan = lk.BatchPlan.from_ids(ids, L)
    with lk.backend("cpu"):
        cpu_plan = lk.BatchPlan.from_ids(ids.cpu(), L)
    size = L + 3 + int(plan.table[2 + L])
    assert torch.equal(plan.table[:size].cpu(), cpu_plan.table[:size])
    got = {"a plan": lk.bgmv(**{**make(sample), "adapter_ids": plan}), "multi_lora": lk.multi_lora(**make(sample))}
    if "mixture" not in sample.traits:
        segments = [t.cuda() for t in as_segments(ids.cpu())]
        b = make(sample)
        got["sgmv"] = lk.sgmv(b["y"], b["x"], b["A"], b["B"], *segments, **options)
    for form, value in got.items():
        assert bitwise_equal(value, want), form


@pytest.mark.parametrize("name, sample", [p for p in SAMPLES if "mixture" not in p.values[1].traits])
def test_halves(name, sample, kernels):
    a, b = make(sample), sample.make(0)
    v = lk.bgmv_shrink(a["x"], a["A"], a["adapter_ids"], ranks=a["ranks"])
    oracle = shrink_oracle(b["x"], b["A"], b["adapter_ids"], ranks=b["ranks"])
    squares = [t.double() ** 2 for t in ((b["A"],) if isinstance(b["A"], torch.Tensor) else b["A"])]
    terms = shrink_oracle(b["x"].double() ** 2, squares, b["adapter_ids"], ranks=b["ranks"])
    noise = b["x"].shape[-1] ** 0.5 * 2**-24 * rms(terms[terms.isfinite()].sqrt())
    assert_within_rule(v.cpu(), oracle, oracle.float(), noise=noise, what="v")
    assert not v.cpu()[oracle == 0].any()
    y = lk.bgmv_expand(a["y"], v, a["B"], a["adapter_ids"], scaling=a["scaling"], ranks=a["ranks"])
    oracle, plain, noise = expected(sample)
    assert_within_rule(y.cpu(), oracle, plain, noise=noise, what="y")


@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
@pytest.mark.parametrize("K, N, R", ((63, 31, 3), (4096, 1024, 16), (2500, 577, 40), (14336, 4096, 128)))
def test_a_row_does_not_feel_its_batch(name, K, N, R, kernels):
    dtypes = LOW_RANK_DTYPES[name]
    M, L = 700, 4
    x, y = torch.randn(M, K, device="cuda").to(dtypes.x), torch.randn(M, N, device="cuda").to(dtypes.y)
    A = (torch.randn(L, R, K, device="cuda") / K**0.5).to(dtypes.factors)
    B = torch.randn(L, N, R, device="cuda").to(dtypes.factors)
    scaling = torch.rand(L, device="cuda")
    ids = torch.randint(-1, L, (M,), device="cuda")
    want = lk.bgmv(y.clone(), x, A, B, ids, scaling=scaling)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, ids, scaling=scaling), want)
    for rows in (slice(0, 1), slice(5, 21), slice(3, 160), slice(100, 500)):
        assert bitwise_equal(lk.bgmv(y[rows].clone(), x[rows], A, B, ids[rows], scaling=scaling), want[rows]), rows


GRADIENTS = ("gate-up-live-ranks", "qkv-shared-ranks", "listed-live-ranks", "mixture-of-3", "r100", "no-adapter")


@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
@pytest.mark.parametrize("sample", GRADIENTS)
def test_gradients(name, sample):
    sample = next(s for s in low_rank_samples(*LOW_RANK_DTYPES[name]) if s.name == sample)

    def gradients(function, device, make_leaf):
        a = sample.make(0)
        form, count = type(a["A"]), 1 if isinstance(a["A"], torch.Tensor) else len(a["A"])
        factors = [t for f in "AB" for t in ((a[f],) if count == 1 else a[f])]
        leaves = [make_leaf(t.nan_to_num().to(device)) for t in (a["x"], a["y"], *factors)]
        A, B = leaves[2 : 2 + count], leaves[2 + count : 2 + 2 * count]
        A, B = (A[0], B[0]) if form is torch.Tensor else (form(A), form(B))
        rest = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in a.items()}
        if rest["weights"] is not None:
            rest["weights"] = make_leaf(rest["weights"])
            leaves.append(rest["weights"])
        out = function(**{**rest, "x": leaves[0], "y": leaves[1], "A": A, "B": B})
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(device, out.dtype)
        return torch.autograd.grad(out, leaves, weight, materialize_grads=True)

    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    got = gradients(lk.multi_lora, "cuda", leaf)
    again = gradients(lk.multi_lora, "cuda", leaf)
    plain = gradients(low_rank_plain, "cpu", leaf)
    want = gradients(low_rank_oracle, "cpu", lambda t: t.detach().double().requires_grad_())
    for i, (g, g2, p, w) in enumerate(zip(got, again, plain, want, strict=True)):
        assert bitwise_equal(g, g2)
        assert_within_rule(g.cpu(), w, p, noise=2**-20 * rms(w), what=f"gradient {i}")


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "bf16-masters"))
@pytest.mark.parametrize("R, slices", ((8, 1), (16, 3), (40, 1), (128, 2)))
def test_gradients_of_many_rows(dtype, R, slices):
    """Adapters of several tiles, some thousand rows, against fp64 on the GPU."""
    dtypes, M, K, N, L = LOW_RANK_DTYPES[dtype], 3000, 520, 264, 3
    x, dy = torch.randn(M, K, device="cuda").to(dtypes.x), torch.randn(M, N * slices, device="cuda").to(dtypes.y)
    A, B = (
        [torch.randn(size, device="cuda").to(dtypes.factors) for _ in range(slices)] for size in ((L, R, K), (L, N, R))
    )
    ids = torch.randint(-1, L, (M,), device="cuda")

    def gradients(cast):
        leaves = [t.detach().to(cast or t.dtype, copy=True).requires_grad_() for t in (x, *A, *B)]
        a, b = tuple(leaves[1 : 1 + slices]), tuple(leaves[1 + slices :])
        out = lk.multi_lora(leaves[0], a, b, ids, y=torch.zeros_like(dy, dtype=cast or dtypes.y))
        return torch.autograd.grad(out, leaves, dy.to(out.dtype))

    got, again = gradients(None), gradients(None)
    with lk.backend("reference"):
        want = gradients(torch.float64)
    for i, (g, g2, w) in enumerate(zip(got, again, want, strict=True)):
        assert bitwise_equal(g, g2), i
        unit = 2**-19 if g.dtype == torch.float32 else 2**-8
        assert rms(g.double() - w) <= unit * rms(w), i


@pytest.mark.parametrize("name", ("fp32", "bf16"))
def test_slices_of_many_rows(name):
    """More rows than a small batch has: x is read once for all slices, and each has the bits it has alone."""
    dtypes, M, K, R, L, widths = LOW_RANK_DTYPES[name], 2000, 4096, 16, 4, (512, 128, 100)
    x, y = torch.randn(M, K, device="cuda").to(dtypes.x), torch.randn(M, sum(widths), device="cuda").to(dtypes.y)
    A = tuple(torch.randn(L, R, K, device="cuda").to(dtypes.factors) / 64 for _ in widths)
    B = tuple(torch.randn(L, n, R, device="cuda").to(dtypes.factors) for n in widths)
    ids = torch.randint(-1, L, (M,), device="cuda")
    got = lk.bgmv(y.clone(), x, A, B, ids)
    for s, part in enumerate(y.split(widths, 1)):
        alone = lk.bgmv(part.clone(), x, A[s], B[s], ids)
        assert bitwise_equal(got.split(widths, 1)[s].clone(), alone), s


@pytest.mark.parametrize("name, sample", [p for p in SAMPLES if p.values[0] in ("bf16", "fp16")])
def test_one_launch_has_the_bits_of_two(name, sample):
    if "cuda" not in lora_add_.backends() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the CUDA kernels and a GPU with clusters")
    with lk.backend("cuda"):
        want = lk.bgmv(**make(sample))
        torch.ops.lora_kernels_C.set_clusters(True)
        try:
            got = lk.bgmv(**make(sample))
        finally:
            torch.ops.lora_kernels_C.set_clusters(False)
    assert bitwise_equal(got, want)


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_repeated_calls(name, monkeypatch):
    """A call of a kind that was seen before skips what its first one found out: other tensors, the same bits."""
    for op in (lora_add_, lora_shrink, lora_expand_, lora_plan_):
        if name not in op.backends():
            pytest.skip(f"no {name} kernels here")
        monkeypatch.setattr(op, "prefers_cuda", lambda *args: name == "cuda")
        monkeypatch.setattr(op, "_known", set())
    L, K, N, R = 5, 640, 384, 16
    A, B = torch.randn(L, R, K, device="cuda"), torch.randn(L, N, R, device="cuda")
    store = torch.randn(9 * K + 1, device="cuda")
    for M in (3, 9, 3, 9, 9):
        for shift in (0, 1, 0, 1):  # aligned, not aligned
            x, ids = store[shift : shift + M * K].view(M, K), torch.randint(-1, L, (M,), device="cuda")
            y = torch.randn(M, N, device="cuda")
            want = lk.bgmv_expand(y.clone(), lk.bgmv_shrink(x, A, ids), B, ids)
            plan = lk.BatchPlan.from_ids(ids, L)
            for routing in (ids, plan, ids, plan):
                assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, routing), want)
            listed = lk.bgmv(y.clone(), x, list(A), list(B), ids)
            torch.testing.assert_close(listed, want)


def test_a_captured_graph_serves_other_ids(kernels):
    M, K, N, R, L = 48, 512, 768, 16, 6
    x, A = torch.randn(M, K, device="cuda"), torch.randn(L, R, K, device="cuda")
    B, y = torch.randn(L, N, R, device="cuda"), torch.zeros(M, N, device="cuda")
    plan = lk.BatchPlan.empty(M, L, "cuda")
    ids = torch.zeros(M, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        plan.update_(ids)
        lk.bgmv(y, x, A, B, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.zero_()
        plan.update_(ids)
        lk.bgmv(y, x, A, B, plan)
    for seed in range(6):
        torch.manual_seed(seed)
        ids.copy_(torch.randint(-1, L if seed % 2 else 1, (M,)))
        graph.replay()
        assert bitwise_equal(y, lk.bgmv(torch.zeros_like(y), x, A, B, ids))


def test_nothing_waits_for_the_host(kernels):
    x, A, B = (torch.randn(s, device="cuda") for s in ((8, 64), (3, 4, 64), (3, 32, 4)))
    y, ids = torch.zeros(8, 32, device="cuda"), torch.tensor([0, 1, 2, -1, 0, 1, 2, 0], device="cuda")
    lk.bgmv(y, x, A, B, ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lk.bgmv(y, x, A, B, ids)
        lk.bgmv(y, x, A, B, lk.BatchPlan.from_ids(ids, 3))
        lk.lora_linear(x, torch.empty(32, 64, device="cuda"), A[0], B[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("check", [c for c in layouts.CHECKS if c.__name__ not in ("packed_gradients", "lists")])
def test_any_layout_by_cuda(check):
    if "cuda" not in lora_add_.backends():
        pytest.skip("no cuda kernels here")
    with lk.backend("cuda"):
        check("cuda")


def test_an_id_out_of_range_is_no_adapter(kernels):
    x, A, B = (torch.randn(s, device="cuda") for s in ((4, 64), (2, 4, 64), (2, 32, 4)))
    y = torch.ones(4, 32, device="cuda")
    lk.bgmv(y, x, A, B, torch.tensor([0, 2, -5, 1 << 20], device="cuda"))
    assert bool((y[1:] == 1).all())
    assert not bool((y[0] == 1).all())
    plan = lk.BatchPlan.from_ids(torch.tensor([0, 1, 2, 3], device="cuda"), 7)
    before = y.clone()
    lk.bgmv(y, x, A, B, plan)  # of other adapters
    assert bitwise_equal(y, before)


def test_many_adapters(kernels):
    M, L = 3000, 2500
    x, A, B = (
        torch.randn(M, 64, device="cuda"),
        torch.randn(L, 4, 64, device="cuda"),
        torch.randn(L, 32, 4, device="cuda"),
    )
    ids = torch.randint(-1, L, (M,), device="cuda")
    y = lk.bgmv(torch.zeros(M, 32, device="cuda"), x, A, B, ids)
    want = torch.einsum("mr,mnr->mn", torch.einsum("mk,mrk->mr", x.double(), A[ids].double()), B[ids].double())
    want[ids < 0] = 0
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiles_once(dtype):
    K, N, R = 64, 48, 8
    A, B = torch.randn(3, R, K, device="cuda", dtype=dtype), torch.randn(3, N, R, device="cuda", dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, ids: lk.multi_lora(x, A, B, ids), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for M in (5, 9, 33):
        x, ids = torch.randn(M, K, device="cuda", dtype=dtype), torch.randint(-1, 3, (M,), device="cuda")
        assert bitwise_equal(compiled(x, ids), lk.multi_lora(x, A, B, ids))


@pytest.mark.parametrize("check", layouts.CHECKS)
def test_any_layout(check):
    check("cuda")
