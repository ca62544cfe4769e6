"""BatchPlan: one grouping for every layer of a step."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import as_segments, bitwise_equal

L = 4
A, B = torch.randn(L, 8, 48), torch.randn(L, 40, 8)


def inputs(ids):
    generator = torch.Generator().manual_seed(len(ids))
    return torch.randn(len(ids), 40, generator=generator), torch.randn(len(ids), 48, generator=generator)


def same_as_ids(plan, ids):
    """The plan gives the bits of the ids, in every function that takes it; and they differ from y."""
    y, x = inputs(ids)
    want = lk.bgmv(y.clone(), x, A, B, ids, scaling=0.5)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, plan, scaling=0.5), want)
    assert bitwise_equal(lk.sgmv(y.clone(), x, A, B, plan, scaling=0.5), want)
    assert bitwise_equal(lk.multi_lora(x, A, B, plan, scaling=0.5, y=y), want)
    v = lk.bgmv_shrink(x, A, ids)
    assert bitwise_equal(lk.bgmv_shrink(x, A, plan), v)
    assert bitwise_equal(lk.sgmv_shrink(x, A, plan), v)
    halves = lk.bgmv_expand(y.clone(), v, B, ids, scaling=0.5)
    assert bitwise_equal(lk.bgmv_expand(y.clone(), v, B, plan, scaling=0.5), halves)
    assert bitwise_equal(lk.sgmv_expand(y.clone(), v, B, plan, scaling=0.5), halves)
    live = ids >= 0
    assert not (want[live] == y[live]).all(1).any()
    assert bitwise_equal(want[~live], y[~live])
    assert plan.num_pairs == len(ids)


IDS = {
    "mixed": torch.tensor([3, -1, 0, 0, 2, 3, -1, 1, 1, 0]),
    "int32": torch.tensor([2, 2, 0, -1], dtype=torch.int32),
    "none": torch.full((5,), -1),
    "one": torch.tensor([1]),
    "last": torch.full((40,), L - 1),
    "empty": torch.tensor([], dtype=torch.int64),
    "random": torch.randint(-1, L, (300,), generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", IDS)
def test_from_ids(name, backend):
    ids = IDS[name]
    plan = lk.BatchPlan.from_ids(ids, L)
    same_as_ids(plan, ids)
    assert plan.capacity == len(ids)
    assert plan.num_adapters == L


@pytest.mark.parametrize("name", IDS)
def test_from_segments(name, backend):
    ids = IDS[name]
    indptr, names = as_segments(ids)
    rows = int(indptr[-1])
    plan = lk.BatchPlan.from_segments(indptr, names, L)
    same_as_ids(plan, ids[:rows])


def test_rows_past_the_last_segment_have_no_adapter(backend):
    ids = torch.tensor([1, 1, 0, -1, -1])
    indptr, names = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 0])
    y, x = inputs(ids)
    want = lk.bgmv(y.clone(), x, A, B, ids)
    assert bitwise_equal(lk.sgmv(y.clone(), x, A, B, indptr, names), want)
    assert bitwise_equal(want[3:], y[3:])
    assert bitwise_equal(lk.sgmv(y.clone(), x, A, B, torch.tensor([0]), names[:0]), y)


def test_update_keeps_its_memory(backend):
    plan = lk.BatchPlan.empty(300, L)
    address = plan.table.data_ptr()
    for ids in (*IDS.values(), IDS["one"], IDS["random"]):
        assert plan.update_(ids) is plan
        same_as_ids(plan, ids)
    assert plan.table.data_ptr() == address
    assert plan.capacity == 300


def test_an_empty_plan_is_of_no_rows(backend):
    plan = lk.BatchPlan.empty(8, L)
    y, x = inputs(IDS["empty"])
    assert plan.num_pairs == 0
    assert lk.bgmv(y, x, A, B, plan).shape == (0, 40)
    assert repr(plan) == "BatchPlan(num_adapters=4, capacity=8, device=cpu)"


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows_past_the_plan_have_no_adapter(rows, backend):
    """As where an engine pads a batch."""
    ids = IDS["mixed"].clone()
    plan = lk.BatchPlan.empty(64, L).update_(ids[:rows])
    y, x = inputs(ids)
    ids[rows:] = -1
    want = lk.bgmv(y.clone(), x, A, B, ids)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, plan), want)
    assert bitwise_equal(lk.multi_lora(x, A, B, plan, y=y), want)
    v = lk.bgmv_shrink(x, A, plan)
    assert bitwise_equal(v, lk.bgmv_shrink(x, A, ids))
    assert bitwise_equal(lk.bgmv_expand(y.clone(), v, B, plan), lk.bgmv_expand(y.clone(), v, B, ids))


def test_one_plan_serves_many_layers(backend):
    ids = IDS["random"]
    plan = lk.BatchPlan.from_ids(ids, L)
    before = plan.table.clone()
    for K, N, R in ((48, 40, 8), (16, 100, 3)):
        a, b = torch.randn(L, R, K), torch.randn(L, N, R)
        x, y = torch.randn(len(ids), K), torch.randn(len(ids), N)
        assert bitwise_equal(lk.bgmv(y.clone(), x, a, b, plan), lk.bgmv(y.clone(), x, a, b, ids))
    assert bitwise_equal(plan.table, before)


def test_mixture(backend):
    pairs = torch.tensor([[0, 1, -1], [2, 2, 0], [-1, -1, -1], [3, 0, 1]])
    weights = torch.rand(4, 3)
    y, x = inputs(pairs)
    plan = lk.BatchPlan.from_ids(pairs, L)
    assert plan.num_pairs == 12
    want = lk.bgmv(y.clone(), x, A, B, pairs, weights=weights)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, plan, weights=weights), want)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.empty(20, L).update_(pairs), weights=weights), want)
    assert not bitwise_equal(want[1], y[1])
    assert bitwise_equal(want[2], y[2])
    with pytest.raises(ValueError, match="plan is of 12 rows, x has 4"):
        lk.bgmv(y, x, A, B, plan)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_strided_ids_segments_and_values(dtype, backend):
    """Routing tensors may be columns of larger ones."""
    table = torch.randint(-1, L, (20, 3)).to(dtype)
    ids, spread = table[:, 1], torch.rand(L, 2)[:, 0]
    ranks = torch.tensor([[8, 1], [3, 1], [0, 1], [5, 1]], dtype=torch.int32)[:, 0]
    y, x = inputs(ids)
    want = lk.bgmv(y.clone(), x, A, B, ids.clone(), scaling=spread.clone(), ranks=ranks.clone())
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, ids, scaling=spread, ranks=ranks), want)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.from_ids(ids, L), scaling=spread, ranks=ranks), want)
    segments = [torch.stack([t, t + 7], 1)[:, 0] for t in as_segments(ids)]
    assert bitwise_equal(lk.sgmv(y.clone(), x, A, B, *segments, scaling=spread, ranks=ranks), want)
    pairs, weights = table.T.contiguous().T, torch.rand(3, 20).T
    mixed = lk.bgmv(y.clone(), x, A, B, table, weights=weights.contiguous())
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, pairs, weights=weights), mixed)
