"""The ``low_rank`` CUDA kernels on the host executor, in several orders of threads, against the float64 oracle."""

import layouts
import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops._low_rank import lora_add_
from lora_kernels.testing import (
    LOW_RANK_DTYPES,
    as_segments,
    assert_within_rule,
    bitwise_equal,
    low_rank_oracle,
    low_rank_plain,
    low_rank_samples,
    low_rank_terms,
    rms,
)

ORDERS = range(5)
SAMPLES = [
    pytest.param(sample, id=f"{name}-{sample.name}")
    for name, dtypes in LOW_RANK_DTYPES.items()
    for sample in low_rank_samples(*dtypes)
    if not sample.traits & {"large"} or name in ("bf16", "bf16-masters")
]


ONE_LAUNCH = [
    pytest.param(name, sample, id=f"{name}-{sample.name}")
    for name in ("bf16", "fp16")
    for sample in low_rank_samples(*LOW_RANK_DTYPES[name])
    if not sample.traits & {"large", "mixture"}
]


@pytest.fixture(autouse=True)
def sim():
    with lk.backend("sim"):
        yield


def in_order(seed):
    from lora_kernels import _sim

    _sim.set_seed(seed)


@pytest.mark.parametrize("sample", SAMPLES)
def test_bgmv(sample):
    b = sample.make(0)
    oracle, plain = low_rank_oracle(**b), low_rank_plain(**b)
    noise = b["x"].shape[-1] ** 0.5 * 2**-24 * low_rank_terms(**b)
    first = None
    for seed in ORDERS:
        in_order(seed)
        a = sample.make(0)
        outside = a["y"] if a["y"]._base is None else a["y"]._base
        before = outside.clone()
        y = lk.bgmv(**a)
        assert_within_rule(y, oracle, plain, noise=noise, what=f"{sample.name} in order {seed}")
        first = y.clone() if first is None else first
        assert bitwise_equal(y, first), f"order {seed} gives other bits"
        y.copy_(before.as_strided(y.shape, y.stride(), y.storage_offset()))
        assert bitwise_equal(outside, before), "wrote outside y"


@pytest.mark.parametrize("M, R, name", ((1, 9, "fp32"), (40, 16, "bf16"), (300, 120, "bf16"), (70, 9, "fp16-masters")))
def test_forms_agree(M, R, name):
    """Also where one block sums all of K instead of many (300 rows of rank 120): a row's bits are its own."""
    torch.manual_seed(M)
    dtypes, K, N, L = LOW_RANK_DTYPES[name], 1100, 70, 5
    x, y = torch.randn(M, K).to(dtypes.x), torch.randn(M, N).to(dtypes.y)
    A, B = (torch.randn(L, R, K) / 33).to(dtypes.factors), torch.randn(L, N, R).to(dtypes.factors)
    ids = torch.randint(-1, L, (M,)).sort().values
    want = lk.bgmv(y.clone(), x, A, B, ids)
    v = lk.bgmv_shrink(x, A, ids)
    got = {
        "a plan": lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.from_ids(ids, L)),
        "segments": lk.sgmv(y.clone(), x, A, B, *as_segments(ids)),
        "halves": lk.bgmv_expand(y.clone(), v, B, ids),
    }
    assert M == 1 or not bitwise_equal(want, y)
    for form, value in got.items():
        assert bitwise_equal(value, want), form
    half = lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.empty(M, L).update_(ids[: M // 2]))
    assert bitwise_equal(half, torch.cat([want[: M // 2], y[M // 2 :]])), "a plan of half the rows"
    for m in range(0, M, max(M // 7, 1)):
        alone = lk.bgmv(y[m : m + 1].clone(), x[m : m + 1], A, B, ids[m : m + 1])
        assert bitwise_equal(alone, want[m : m + 1]), f"row {m} alone"


def test_planes_that_are_added_up_first():
    """Where each of many blocks of columns would add up many planes for itself."""
    M, K, N, R = 250, 4096, 2111, 128
    x, y = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    A, B = (torch.randn(1, R, K) / 64).bfloat16(), torch.randn(1, N, R).bfloat16()
    ids = torch.zeros(M, dtype=torch.int64)
    got = lk.bgmv(y.clone(), x, A, B, ids)
    for m in (0, 130, 249):
        assert bitwise_equal(lk.bgmv(y[m : m + 1].clone(), x[m : m + 1], A, B, ids[:1]), got[m : m + 1])
    with lk.backend("cpu"):
        want = lk.bgmv(y.clone(), x, A, B, ids)
    assert rms(got.double() - want.double()) <= 2**-8 * rms(want.double() - y.double())


@pytest.fixture
def clusters():
    from lora_kernels import _sim

    _sim.set_clusters(True)
    yield
    _sim.set_clusters(False)


@pytest.mark.parametrize("name, sample", ONE_LAUNCH)
def test_one_launch_has_the_bits_of_two(name, sample, request):
    """As clusters make it, of up to ten chunks of K and nine blocks of columns for eight blocks."""
    want = lk.bgmv(**sample.make(0))
    request.getfixturevalue("clusters")
    for seed in ORDERS:
        in_order(seed)
        assert bitwise_equal(lk.bgmv(**sample.make(0)), want), f"order {seed}"


def test_no_rows_of_strides_that_are_not_one():
    x, y = torch.empty(0, 4, 3, 16).transpose(1, 2), torch.empty(0, 4, 3, 8).transpose(1, 2)
    lora_add_(y, x, [torch.ones(1, 4, 16)], [torch.ones(1, 8, 4)], *[None] * 6, 1.0)


def test_a_row_without_an_adapter_keeps_its_sign():
    """Also in a mixture, of which it is a row like others."""
    y, weights = torch.full((3, 8), -0.0), torch.rand(3, 2)
    ids = torch.tensor([[-1, -1], [0, -1], [-1, -1]])
    lk.bgmv(y, torch.zeros(3, 40), torch.ones(1, 4, 40), torch.ones(1, 8, 4), ids, weights=weights)
    assert torch.signbit(y[[0, 2]]).all()


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters", "fp16"))
def test_halves_of_transposed_factors(name):
    """As gradients use them: dy by B as it lies, dv by A."""
    torch.manual_seed(0)
    dtypes, M, K, N, R, L = LOW_RANK_DTYPES[name], 21, 200, 72, 24, 3
    x, A = torch.randn(M, K).to(dtypes.x), (torch.randn(L, K, R) / 14).to(dtypes.factors)
    y, B = torch.randn(M, N).to(dtypes.y), torch.randn(L, R, N).to(dtypes.factors)
    ids = torch.randint(-1, L, (M,))
    v = lk.bgmv_shrink(x, A.mT, ids)
    got = lk.bgmv_expand(y.clone(), v, B.mT, ids)
    with lk.backend("reference"):
        want = lk.bgmv_shrink(x.double(), A.mT.double(), ids)
        torch.testing.assert_close(v.double(), want, rtol=2e-6, atol=2e-6)
        want = lk.bgmv_expand(y.double(), v.double(), B.mT.double(), ids)
    assert rms(got.double() - want) <= 2 * torch.finfo(y.dtype).eps * rms(want)


@pytest.mark.parametrize("M, L", ((0, 3), (1, 1), (50, 7), (700, 3), (40, 0), (90, 70)))
@pytest.mark.parametrize("segmented", (False, True))
def test_plan(M, L, segmented):
    torch.manual_seed(M)
    segmented &= bool(M and L)
    ids = torch.randint(-1, L, (M,)) if L else torch.full((M,), -1)
    if segmented:
        ids[-1] = L - 1
    with lk.backend("reference"):
        want = lk.BatchPlan.from_ids(ids, L)
    size = 3 + L + int(want.table[2 + L])
    for seed in ORDERS:
        in_order(seed)
        got = lk.BatchPlan.from_segments(*as_segments(ids), L) if segmented else lk.BatchPlan.from_ids(ids, L)
        assert torch.equal(got.table[:size], want.table[:size])


def test_a_stale_plan_reads_and_writes_nothing_else():
    """One of another number of adapters, or of a pair that the batch does not have."""
    x, y, A, B = torch.randn(6, 40), torch.randn(6, 24), torch.randn(3, 4, 40), torch.randn(3, 24, 4)
    plan = lk.BatchPlan.from_ids(torch.tensor([0, 1, 2, 0, 1, 2]), 3)
    want = lk.bgmv(y.clone(), x, A, B, plan)

    def add():
        out = y.clone()
        lora_add_(out, x, [A], [B], None, None, plan.table, None, None, None, 1.0)
        return out

    plan.table[1] = 4
    assert bitwise_equal(add(), y)
    plan.table[1] = 3
    plan.table[-1] = 6000
    got = add()
    assert bitwise_equal(got[:5], want[:5])
    assert bitwise_equal(got[5], y[5])


@pytest.mark.parametrize("check", [c for c in layouts.CHECKS if c.__name__ not in ("packed_gradients", "lists")])
def test_any_layout(check):
    """But gradients, which take an op that has no CUDA kernel, and lists of more than it takes."""
    check("cpu")


def test_refuses():
    """In words, with nothing written."""
    x, y, ids = torch.randn(4, 40), torch.randn(4, 24), torch.tensor([0, 1, 2, -1])
    A, B = [torch.randn(4, 40)] * 65, [torch.randn(24, 4)] * 65
    pairs, weights = torch.stack([ids, ids], 1), torch.rand(4, 2)
    refused = {
        "lists of more than 64": (y, x, A, B, ids),
        "fp64": (y, x, A[:3], B[:3], pairs),
        "more than 8 dim": (y.view(4, *[1] * 8, 24), x.view(4, *[1] * 8, 40), A[:3], B[:3], ids),
    }
    before = y.clone()
    for message, args in refused.items():
        with pytest.raises(RuntimeError, match=message):
            lk.bgmv(*args, weights=weights.double() if message == "fp64" else None)
    with pytest.raises(RuntimeError, match=r"torch.float16 factors of a torch.bfloat16 y"):
        lk.bgmv_expand(y.bfloat16(), torch.randn(1, 4, 4), torch.randn(3, 24, 4).half(), ids)
    with pytest.raises(RuntimeError, match="fp64"):
        lk.bgmv(y.double(), x.double(), [a.double() for a in A[:3]], [b.double() for b in B[:3]], ids)
    assert bitwise_equal(y, before)
