"""bgmv, sgmv, their halves and multi_lora on every backend, against the float64 oracle."""

import functools

import pytest
import torch
import torch.nn.functional as F

import lora_kernels as lk
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
    threads,
)


def samples(*names, without=()):
    return [
        pytest.param(sample, id=f"{name}-{sample.name}")
        for name in names
        for sample in low_rank_samples(*LOW_RANK_DTYPES[name])
        if not sample.traits & set(without)
    ]


@functools.cache
def expected(sample):
    """(oracle, plain, noise) of a sample, computed once for all its tests."""
    a = sample.make(0)
    noise = a["x"].shape[-1] ** 0.5 * 2**-24 * low_rank_terms(**a)
    return low_rank_oracle(**a), low_rank_plain(**a), noise


@functools.cache
def expected_shrink(sample):
    """(oracle, noise) of the shrink of a sample."""
    a = sample.make(0)
    options = {"adapter_ids": a["adapter_ids"], "ranks": a["ranks"]}
    squares = [t.double() ** 2 for t in ((a["A"],) if isinstance(a["A"], torch.Tensor) else a["A"])]
    terms = shrink_oracle(a["x"].double() ** 2, squares, **options)
    noise = a["x"].shape[-1] ** 0.5 * 2**-24 * rms(terms[terms.isfinite()].sqrt())
    return shrink_oracle(a["x"], a["A"], **options), noise


def wide(t):
    return t.float() if isinstance(t, torch.Tensor) else type(t)(one.float() for one in t)


def check_bgmv(sample, count=1):
    """bgmv with ``count`` threads within the rule, in place, and nothing written beside y."""
    a = sample.make(0)
    y = a["y"]
    outside = y if y._base is None else y._base
    before = outside.clone()
    with threads(count):
        assert lk.bgmv(**a) is y
    oracle, plain, noise = expected(sample)
    assert_within_rule(y, oracle, plain, noise=noise, what=sample.name)
    y.copy_(before.as_strided(y.shape, y.stride(), y.storage_offset()))
    assert bitwise_equal(outside, before), f"{sample.name}: wrote outside y"


def check_forms(sample):
    """Segments, plans and the functional form give the bits of bgmv."""
    a = sample.make(0)
    options = {name: a[name] for name in ("scaling", "ranks")}
    ids, want = a["adapter_ids"], lk.bgmv(**a)
    L = adapter_count(a["A"])
    plan = lk.BatchPlan.from_ids(ids, L)
    got = {"bgmv with a plan": lk.bgmv(**{**sample.make(0), "adapter_ids": plan})}
    b = sample.make(0)
    kept = b["y"].clone()
    got["multi_lora"] = lk.multi_lora(**b)
    assert bitwise_equal(b["y"], kept), "multi_lora wrote into y"
    if "mixture" not in sample.traits:
        segments = as_segments(ids)
        b = sample.make(0)
        got["sgmv"] = lk.sgmv(b["y"], b["x"], b["A"], b["B"], *segments, **options)
        b = sample.make(0)
        got["sgmv with a plan"] = lk.sgmv(b["y"], b["x"], b["A"], b["B"], plan, **options)
        if segments[0][-1] == ids.numel():
            segmented = lk.BatchPlan.from_segments(*segments, L)
            got["a plan of segments"] = lk.bgmv(**{**sample.make(0), "adapter_ids": segmented})
    for name, value in got.items():
        assert bitwise_equal(value, want), f"{sample.name}: {name} differs from bgmv"


def check_halves(sample):
    """The shrink within the fp32 rule, zero where nothing is live; shrink then expand within the rule."""
    a = sample.make(0)
    x, A, B, ids, ranks = a["x"], a["A"], a["B"], a["adapter_ids"], a["ranks"]
    segments = as_segments(ids)
    v = lk.bgmv_shrink(x, A, ids, ranks=ranks)
    oracle, noise = expected_shrink(sample)
    assert v.dtype == torch.float32
    assert_within_rule(v, oracle, oracle.float(), noise=noise, what=f"v of {sample.name}")
    assert not v[oracle == 0].any()
    assert bitwise_equal(lk.sgmv_shrink(x, A, *segments, ranks=ranks), v)

    oracle, plain, noise = expected(sample)
    options = {"scaling": a["scaling"], "ranks": ranks}
    y = a["y"]
    assert lk.bgmv_expand(y, v, B, ids, **options) is y
    assert_within_rule(y, oracle, plain, noise=noise, what=f"{sample.name} in halves")
    again = sample.make(0)["y"]
    assert bitwise_equal(lk.sgmv_expand(again, v, B, *segments, **options), y)


@pytest.mark.parametrize("sample", samples("fp32", "fp16", "bf16-masters"))
def test_reference(sample):
    with lk.backend("reference"):
        check_bgmv(sample)
        check_forms(sample)


@pytest.mark.parametrize("sample", samples("fp32", "bf16", without=("mixture",)))
def test_reference_halves(sample):
    with lk.backend("reference"):
        check_halves(sample)


@pytest.mark.parametrize("sample", samples(*LOW_RANK_DTYPES))
def test_cpu(sample, cpu_backend):
    check_bgmv(sample)
    check_forms(sample)


@pytest.mark.parametrize("sample", samples(*LOW_RANK_DTYPES, without=("mixture",)))
def test_cpu_halves(sample, cpu_backend):
    check_halves(sample)


@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
def test_every_instruction_set(name, isa):
    for sample in low_rank_samples(*LOW_RANK_DTYPES[name]):
        if "large" not in sample.traits:
            check_bgmv(sample)
            if "mixture" not in sample.traits:
                check_halves(sample)


@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
def test_two_threads(name, cpu_backend):
    for sample in low_rank_samples(*LOW_RANK_DTYPES[name]):
        check_bgmv(sample, count=2)


@pytest.mark.parametrize("sample", samples(*(name for name in LOW_RANK_DTYPES if name.endswith("y32"))))
def test_sums_and_v_are_held_in_fp32(sample, backend):
    """A float32 y shows what the sums were held in: half-precision inputs cost it nothing."""
    a = sample.make(0)
    oracle, _, noise = expected(sample)
    plain = low_rank_plain(**{**a, "x": a["x"].float(), "A": wide(a["A"]), "B": wide(a["B"])})
    assert_within_rule(lk.bgmv(**a), oracle, plain, noise=noise, what=sample.name)


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
@pytest.mark.parametrize("shape", ((1, 64, 96, 8), (7, 63, 1000, 3), (5, 100, 33, 16), (65, 576, 192, 32)))
def test_lora_linear(name, shape, backend):
    M, K, N, R = shape
    x_dtype, factor_dtype, _ = LOW_RANK_DTYPES[name]
    x, W, bias = torch.randn(M, K).to(x_dtype), (torch.randn(N, K) / K**0.5).to(x_dtype), torch.randn(N).to(x_dtype)
    A, B = (torch.randn(R, K) / K**0.5).to(factor_dtype), (torch.randn(N, R) / R**0.5).to(factor_dtype)
    ids = torch.zeros(M, dtype=torch.int64)
    for b in (None, bias):
        got = lk.lora_linear(x, W, A, B, scaling=0.7, bias=b, dropout=0.5)
        base = F.linear(x.double(), W.double(), None if b is None else b.double())
        oracle = low_rank_oracle(base, x, A[None], B[None], ids, scaling=0.7)
        plain = low_rank_plain(F.linear(x, W, b), x, A[None], B[None], ids, scaling=0.7)
        terms = (x.double() ** 2 @ W.double().T ** 2).mean().sqrt() + 1
        assert got.dtype == x_dtype
        assert_within_rule(got, oracle, plain, noise=2**-24 * K**0.5 * float(terms))
        stacked = lk.lora_linear(x.reshape(1, M, 1, K), W, A.T.contiguous().T, B.T.contiguous().T, scaling=0.7, bias=b)
        assert_within_rule(stacked.reshape(M, N), oracle, plain, noise=2**-24 * K**0.5 * float(terms))


def test_plain_defaults(backend):
    """No scaling is 1, no y is zeros, one tensor and a tuple of one are the same."""
    x, A, B, ids = torch.randn(6, 32), torch.randn(2, 4, 32), torch.randn(2, 24, 4), torch.tensor([0, 1, -1, 1, 0, 0])
    want = lk.bgmv(torch.zeros(6, 24), x, A, B, ids, scaling=1.0)
    assert bitwise_equal(lk.multi_lora(x, A, B, ids), want)
    assert bitwise_equal(lk.multi_lora(x, (A,), (B,), ids, scaling=torch.ones(2)), want)
    assert bitwise_equal(lk.multi_lora(x, A, B, ids, scaling=1, ranks=torch.tensor([4, 4], dtype=torch.int32)), want)
    assert want[2].abs().max() == 0
    assert want[0].abs().max() > 0
    assert lk.multi_lora(x.bfloat16(), A.bfloat16(), B.bfloat16(), ids).dtype == torch.bfloat16


def test_inference_mode(route):
    x, A, B, ids = torch.randn(5, 32), torch.randn(2, 4, 32), torch.randn(2, 24, 4), torch.tensor([0, 1, -1, 1, 0])
    want = lk.bgmv(torch.ones(5, 24), x, A, B, ids)
    x.requires_grad_()
    y = torch.ones(5, 24)
    with torch.inference_mode():
        assert bitwise_equal(lk.bgmv(y, x, A, B, ids), want)
        assert bitwise_equal(lk.bgmv(torch.ones(5, 24), x, A, B, ids), want)
        assert bitwise_equal(lk.multi_lora(x, A, B, ids, y=torch.ones(5, 24)), want)
    with torch.no_grad():
        assert bitwise_equal(lk.bgmv(torch.ones(5, 24), x, A, B, ids), want)


def test_in_place_bumps_the_version(route):
    x, A, B, ids = torch.randn(5, 32), torch.randn(2, 4, 32), torch.randn(2, 24, 4), torch.tensor([0, 1, -1, 1, 0])
    segments = torch.tensor([0, 2, 5]), torch.tensor([1, 0])
    v = lk.bgmv_shrink(x, A, ids)
    for write in (
        lambda y: lk.bgmv(y, x, A, B, ids),
        lambda y: lk.sgmv(y, x, A, B, *segments),
        lambda y: lk.bgmv_expand(y, v, B, ids),
        lambda y: lk.sgmv_expand(y, v, B, *segments),
    ):
        y = torch.zeros(5, 24)
        version = y._version
        write(y)
        assert y._version > version

        leaf, y = torch.randn(5, 24, requires_grad=True), torch.randn(5, 24)
        product = leaf * y
        with torch.no_grad():
            write(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_never_builds_the_weight(backend):
    """At K = N = 2¹⁸ a dense ΔW has 256 GiB."""
    K = N = 2**18
    x, A, B = torch.randn(3, K), torch.randn(2, 2, K, requires_grad=True), torch.randn(2, N, 2, requires_grad=True)
    ids = torch.tensor([1, 0, 1])
    out = lk.multi_lora(x.requires_grad_(), A, B, ids)
    (out * out).sum().backward()
    row = 1
    want = (x[row].double() @ A[0].double().T) @ B[0].double().T
    torch.testing.assert_close(out[row].double(), want, rtol=1e-3, atol=1e-1)
    for grad in (x.grad, A.grad, B.grad):
        assert grad.isfinite().all()
        assert grad.abs().max() > 0


def test_no_rows_of_any_strides(backend):
    """An empty tensor may have any strides: here those of the first 0 rows of a transposed one."""
    x, y = torch.zeros(6, 5).T[:0], torch.zeros(4, 5).T[:0]
    A, B, ids = torch.ones(2, 3, 6), torch.ones(2, 4, 3), torch.tensor([], dtype=torch.int64)
    assert lk.bgmv(y, x, A, B, ids).shape == (0, 4)
    v = lk.bgmv_shrink(x, A, ids)
    assert v.shape == (1, 0, 3)
    assert lk.bgmv_expand(y, v, B, ids).shape == (0, 4)
    assert lk.multi_lora(x, A, B, ids).shape == (0, 4)


@pytest.mark.parametrize("M, K, N, R", ((0, 32, 24, 4), (4, 0, 24, 4), (4, 32, 0, 4), (4, 32, 24, 0), (4, 0, 0, 0)))
def test_sizes_of_zero(M, K, N, R, backend):
    """A sum over nothing is 0, so y stays; gradients have their shapes."""
    x, A, B, y = torch.randn(M, K), torch.randn(2, R, K), torch.randn(2, N, R), torch.ones(M, N)
    ids = torch.tensor([1, 0, -1, 1])[:M]
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, ids), y)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.from_ids(ids, 2)), y)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    out = lk.multi_lora(*leaves, ids, y=y)
    assert bitwise_equal(out.detach(), y)
    for grad, leaf in zip(torch.autograd.grad(out, leaves, torch.ones(M, N)), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_no_adapters_at_all(backend):
    x, A, B, y = torch.randn(4, 32), torch.randn(0, 8, 32), torch.randn(0, 24, 8), torch.ones(4, 24)
    ids = torch.full((4,), -1)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, ids), y)
    assert bitwise_equal(lk.multi_lora(x.requires_grad_(), A, B, ids, y=y).detach(), y)
    with pytest.raises(IndexError, match=r"adapter_ids\[0\] is 0"):
        lk.bgmv(y, x.detach(), A, B, ids + 1)


@pytest.mark.parametrize("rank", (4, 8, 16))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("value", (float("inf"), float("-inf"), float("nan")))
def test_a_column_that_is_no_number_stays_alone(rank, dtype, value):
    """Columns of B that the kernels multiply together do not touch, for few rows as for many."""
    N = 96
    generator = torch.Generator().manual_seed(rank)
    x, A, B = (torch.randn(size, generator=generator) for size in ((20, 32), (1, rank, 32), (1, N, rank)))
    x, A, clean = x.bfloat16(), A.to(dtype), B.to(dtype)
    B = clean.clone()
    B[0, 5, 1] = B[0, 70, 0] = value
    ids = torch.zeros(20, dtype=torch.int64)
    want = lk.bgmv(torch.zeros(20, N, dtype=torch.bfloat16), x, A, clean, ids)
    others = [n for n in range(N) if n not in (5, 70)]
    for m in (1, 2, 8, 16, 20):
        y = lk.bgmv(torch.zeros(m, N, dtype=torch.bfloat16), x[:m], A, B, ids[:m])
        assert bitwise_equal(y[:, others].contiguous(), want[:m, others].contiguous())
        assert not y[:, [5, 70]].isfinite().any()
