"""The reference against float64 mathematics, op by op."""

import math

import pytest
import torch

from lora_kernels.reference import low_rank as reference
from lora_kernels.testing import (
    LOW_RANK_DTYPES,
    Dtypes,
    as_segments,
    assert_within_rule,
    expand_oracle,
    low_rank_oracle,
    low_rank_plain,
    low_rank_samples,
    low_rank_terms,
    shrink_oracle,
)

FP64 = Dtypes(torch.float64, torch.float64, torch.float64)
SAMPLES = [
    pytest.param(sample, id=f"{name}-{sample.name}")
    for name, dtypes in {"fp64": FP64, **LOW_RANK_DTYPES}.items()
    for sample in low_rank_samples(*dtypes)
]
FP64_SAMPLES = [pytest.param(sample, id=sample.name) for sample in low_rank_samples(*FP64)]


def factors(value):
    return (value,) if isinstance(value, torch.Tensor) else value


def test_oracles_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [math.nan, 0.0]])
    A = torch.tensor([[[1.0, 0.0], [math.nan, math.nan]], [[1.0, 1.0], [0.0, 2.0]]])
    B = torch.tensor([[[10.0, math.nan]], [[1.0, -1.0]]])
    ids, ranks, scaling = torch.tensor([1, 0, -1]), torch.tensor([1, 2]), torch.tensor([0.5, 4.0])
    y = torch.tensor([[100.0], [200.0], [300.0]])
    # rows: 100 + 4 (1 · 3 - 1 · 4); 200 + 0.5 (10 · 3); 300
    want = torch.tensor([[96.0], [215.0], [300.0]])
    assert torch.equal(low_rank_oracle(y, x, A, B, ids, scaling=scaling, ranks=ranks), want.double())
    assert torch.equal(low_rank_plain(y, x, A, B, ids, scaling=scaling, ranks=ranks), want)
    v = shrink_oracle(x, A, ids, ranks=ranks)
    assert v.tolist() == [[[3.0, 4.0], [3.0, 0.0], [0.0, 0.0]]]
    # the first row mixes both adapters: 2 · 0.5 (10 · 1) + 3 · 4 (3 - 4)
    pairs, weights = torch.tensor([[0, 1], [-1, 0], [-1, -1]]), torch.tensor([[2.0, 3.0], [9.0, 1.0], [1.0, 1.0]])
    mixed = low_rank_oracle(y, x, A, B, pairs, scaling=scaling, ranks=ranks, weights=weights)
    assert mixed.tolist() == [[98.0], [215.0], [300.0]]


def test_terms_bound_the_rounding_of_one_sum():
    y, x = torch.tensor([[3.0]]), torch.tensor([[1.0, 2.0]])
    A, B = torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[5.0]]])
    assert low_rank_terms(y, x, A, B, torch.tensor([0])) == pytest.approx(math.sqrt(9 + 100 + 100))


def test_the_rule_tells_right_from_wrong():
    oracle = torch.linspace(1, 2, 101, dtype=torch.float64)
    plain = oracle + 1e-3
    assert_within_rule((oracle + 1e-3).float(), oracle, plain)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_within_rule((oracle + 2e-3).float(), oracle, plain)
    assert_within_rule((oracle + 2e-3).float(), oracle, plain, noise=3e-3)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_within_rule((oracle + 2e-3).to(torch.float16), oracle, plain, noise=3e-3)
    spike = oracle.clone()
    spike[50] += 5e-3
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_rule(spike.float(), oracle, plain)
    with pytest.raises(AssertionError, match="NaN"):
        assert_within_rule(torch.full_like(oracle, math.nan), oracle, plain)
    with pytest.raises(AssertionError, match="NaN"):
        assert_within_rule(oracle, torch.full_like(oracle, math.nan), plain)


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(2).isnan().all()
    assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.parametrize("sample", SAMPLES)
def test_add(sample):
    a = sample.make(0)
    oracle, plain, terms = low_rank_oracle(**a), low_rank_plain(**a), low_rank_terms(**a)
    eps = torch.finfo(a["y"].dtype).eps
    scaling = a["scaling"]
    scale, scaling = (scaling or 1.0, None) if not isinstance(scaling, torch.Tensor) else (1.0, scaling)
    ids, A, B = a["adapter_ids"], factors(a["A"]), factors(a["B"])
    reference.lora_add_(a["y"], a["x"], A, B, ids, None, None, scaling, a["ranks"], a["weights"], scale)
    assert_within_rule(a["y"], oracle, plain, noise=a["x"].shape[-1] ** 0.5 * eps / 2 * terms)


@pytest.mark.parametrize("sample", FP64_SAMPLES)
def test_halves_and_outer_in_fp64(sample):
    a = sample.make(0)
    x, A, B, ids, ranks = a["x"], factors(a["A"]), factors(a["B"]), a["adapter_ids"], a["ranks"]
    scaling = a["scaling"] if isinstance(a["scaling"], torch.Tensor) else None
    v = reference.lora_shrink(x, A, ids, None, None, ranks, ids.numel())
    torch.testing.assert_close(v, shrink_oracle(x, a["A"], ids, ranks=ranks), rtol=1e-12, atol=1e-12, equal_nan=True)

    y = a["y"].clone()
    reference.lora_expand_(y, v, B, ids, None, None, scaling, ranks, a["weights"], 0.5)
    twice = expand_oracle(a["y"], 0.5 * v, B, ids, scaling=scaling, ranks=ranks, weights=a["weights"])
    torch.testing.assert_close(y, twice, rtol=1e-12, atol=1e-12, equal_nan=True)

    u, L = y.reshape(-1, y.shape[-1]), reference.num_adapters(A)
    shared = scaling if scaling is not None and scaling.dim() == 1 else None
    outer = reference.lora_outer(u, v[0], L, ids, None, None, shared, a["weights"], 2.0, ids.numel())
    want = torch.zeros(L, u.shape[-1], v.shape[-1], dtype=torch.float64)
    k = ids.shape[1] if ids.dim() == 2 else 1
    weights = torch.ones(ids.numel()) if a["weights"] is None else a["weights"].reshape(-1)
    for pair, l in enumerate(ids.reshape(-1).tolist()):
        if l >= 0:
            s = 2.0 if shared is None else 2.0 * shared[l].double()
            want[l] += s * weights[pair].double() * torch.outer(u[pair // k], v[0, pair])
    torch.testing.assert_close(outer, want, rtol=1e-12, atol=1e-12, equal_nan=True)


def table(ids, indptr, L, capacity):
    """(pairs, L, bounds, pairs by adapter) as lora_plan_ writes them."""
    t = torch.full((3 + L + capacity,), -7, dtype=torch.int32)
    reference.lora_plan_(t, ids, indptr, L)
    pairs, adapters, *rest = t.tolist()
    bounds, order = rest[: L + 1], rest[L + 1 :]
    return pairs, adapters, bounds, order[: bounds[-1]]


def test_plan_tables():
    ids = torch.tensor([2, -1, 0, 2, 0])
    assert table(ids, None, 3, 5) == (5, 3, [0, 2, 2, 4], [2, 4, 0, 3])
    assert table(ids.int(), None, 3, 8) == (5, 3, [0, 2, 2, 4], [2, 4, 0, 3])
    assert table(torch.tensor([[1, 0], [-1, 1]]), None, 2, 4) == (4, 2, [0, 1, 3], [1, 0, 3])
    indptr, names = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 0, 0])
    assert table(names, indptr, 2, 3) == (3, 2, [0, 1, 3], [2, 0, 1])
    assert table(torch.tensor([], dtype=torch.int32), None, 2, 0) == (0, 2, [0, 0, 0], [])
    assert table(torch.tensor([], dtype=torch.int64), torch.tensor([0]), 1, 0) == (0, 1, [0, 0], [])


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_plan_of_segments_is_the_plan_of_ids(dtype):
    ids = torch.randint(-1, 4, (50,)).sort().values.to(dtype)
    ids = torch.cat([ids, ids[5:20]])
    indptr, names = as_segments(ids)
    assert table(names, indptr, 4, len(ids)) == table(ids, None, 4, len(ids))
