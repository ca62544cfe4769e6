"""Same bits twice, and a row's bits do not depend on the rows beside it."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import LOW_RANK_DTYPES, as_segments, bitwise_equal, low_rank_samples, threads

SIZES = (1, 2, 3, 8, 16, 17, 64, 300)
# K, N, R: around the vector and tile widths, odd ones, and sums over K long enough to be cut into parts
SHAPES = ((64, 96, 8), (63, 31, 3), (1100, 136, 17), (96, 1000, 33), (2500, 577, 16))


@pytest.fixture(autouse=True)
def poisoned():
    """Poisoned memory comes with torch's deterministic algorithms, which must not be what makes these tests pass."""


def inputs(dtypes, K, N, R, L=4, M=300, slices=1):
    x_dtype, factor_dtype, y_dtype = dtypes
    x, y = torch.randn(M, K).to(x_dtype), torch.randn(M, slices * N).to(y_dtype)
    A = tuple((torch.randn(L, R, K) / K**0.5).to(factor_dtype) for _ in range(slices))
    B = tuple(torch.randn(L, N, R).to(factor_dtype) for _ in range(slices))
    return y, x, A, B


def check_rows(dtypes, shape, **options):
    """Thirty rows alone, against the same rows in batches of one adapter and of several, wherever they stand."""
    y, x, A, B = inputs(dtypes, *shape)
    M = x.shape[0]
    ids, same = torch.randint(-1, 4, (M,)), torch.full((M,), 2)
    alone = {}
    for name, chosen in (("several adapters", ids), ("one adapter", same)):
        rows = [slice(m, m + 1) for m in range(30)]
        alone[name] = torch.cat([lk.bgmv(y[m].clone(), x[m], A, B, chosen[m], **options) for m in rows])
        assert not bitwise_equal(alone[name], y[:30])
    for n in SIZES:
        for name, chosen in (("several adapters", ids), ("one adapter", same)):
            probes = torch.randperm(30)[:n]
            rows = torch.cat([probes, torch.arange(30, M)[: n - len(probes)]])
            rows = rows[torch.randperm(n)]
            probe = rows < 30
            i, want = chosen[rows], alone[name][rows[probe]]
            batch = x[rows], A, B
            got = {
                "bgmv": lk.bgmv(y[rows], *batch, i, **options),
                "sgmv": lk.sgmv(y[rows], *batch, *as_segments(i), **options),
                "plan": lk.bgmv(y[rows], *batch, lk.BatchPlan.from_ids(i, 4), **options),
            }
            for form, value in got.items():
                assert bitwise_equal(value[probe], want), f"{form}, {n} rows, {name}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
def test_a_row_does_not_feel_its_batch(name, shape, cpu_backend):
    check_rows(LOW_RANK_DTYPES[name], shape, scaling=0.7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_nor_with_two_threads(name, shape, cpu_backend):
    with threads(2):
        check_rows(LOW_RANK_DTYPES[name], shape, ranks=torch.tensor([3, 2, 1, 3], dtype=torch.int32))


@pytest.mark.parametrize("name", ("fp32", "bf16", "fp16", "bf16-masters"))
def test_nor_in_any_instruction_set(name, isa):
    for shape in SHAPES[2:4]:
        check_rows(LOW_RANK_DTYPES[name], shape)


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_nor_by_halves_slices_and_mixtures(name, cpu_backend):
    y, x, A, B = inputs(LOW_RANK_DTYPES[name], 96, 72, 16, M=80, slices=2)
    ids = torch.randint(-1, 4, (80,))
    v = lk.bgmv_shrink(x, A, ids)
    whole = lk.bgmv_expand(y.clone(), v, B, ids)
    pairs, weights = torch.randint(-1, 4, (80, 3)), torch.rand(80, 3)
    mixture = lk.bgmv(y.clone(), x, A, B, pairs, weights=weights)
    for n in (1, 5, 33):
        rows = torch.randperm(80)[:n]
        part = lk.bgmv_shrink(x[rows], A, ids[rows])
        assert bitwise_equal(part, v[:, rows])
        assert bitwise_equal(lk.bgmv_expand(y[rows].clone(), part, B, ids[rows]), whole[rows])
        got = lk.bgmv(y[rows].clone(), x[rows], A, B, pairs[rows], weights=weights[rows])
        assert bitwise_equal(got, mixture[rows])


@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
def test_same_bits_twice(name, backend):
    for sample in low_rank_samples(*LOW_RANK_DTYPES[name]):
        first, second = (lk.bgmv(**sample.make(0)) for _ in range(2))
        assert bitwise_equal(first, second), sample.name


@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
def test_same_bits_twice_with_two_threads(name, cpu_backend):
    with threads(2):
        for sample in low_rank_samples(*LOW_RANK_DTYPES[name]):
            first, second = (lk.bgmv(**sample.make(0)) for _ in range(2))
            assert bitwise_equal(first, second), sample.name


@pytest.mark.parametrize("count", (1, 2))
@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_same_gradient_bits_twice(name, count, backend):
    y, x, A, B = inputs(LOW_RANK_DTYPES[name], 576, 320, 16, M=150)
    ids, dy = torch.randint(-1, 4, (150,)), torch.randn(150, 320).to(y.dtype)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, A[0], B[0])]
        return torch.autograd.grad(lk.multi_lora(*leaves, ids), leaves, dy)

    with threads(count):
        for p, q in zip(run(), run(), strict=True):
            assert bitwise_equal(p, q)
