"""The ``low_rank`` kernels in the checking interpreter, against the float64 oracle."""

import pytest
import strides
import torch

import lora_kernels as lk
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

SAMPLES = [
    pytest.param(sample, id=f"{name}-{sample.name}")
    for name in ("fp32", "bf16", "fp16-masters", "bf16-masters-y32")
    for sample in low_rank_samples(*LOW_RANK_DTYPES[name])
    if not sample.traits & {"large"}
]


@pytest.fixture(autouse=True)
def triton():
    with lk.backend("triton"):
        yield


@pytest.mark.parametrize("sample", SAMPLES)
def test_bgmv(sample):
    a, b = sample.make(0), sample.make(0)
    outside = a["y"] if a["y"]._base is None else a["y"]._base
    before = outside.clone()
    y = lk.bgmv(**a)
    noise = b["x"].shape[-1] ** 0.5 * 2**-24 * low_rank_terms(**b)
    assert_within_rule(y, low_rank_oracle(**b), low_rank_plain(**b), noise=noise, what=sample.name)
    y.copy_(before.as_strided(y.shape, y.stride(), y.storage_offset()))
    assert bitwise_equal(outside, before), "wrote outside y"


@pytest.mark.parametrize("M", (1, 40, 300))
def test_forms_agree(M):
    """Also on both sides of the batch sizes at which the tiles change."""
    torch.manual_seed(M)
    x, y, L = torch.randn(M, 1100), torch.randn(M, 70), 5
    A, B = torch.randn(L, 9, 1100) / 33, torch.randn(L, 70, 9)
    ids = torch.randint(-1, L, (M,)).sort().values
    want = lk.bgmv(y.clone(), x, A, B, ids)
    v = lk.bgmv_shrink(x, A, ids)
    got = {
        "a plan": lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.from_ids(ids, L)),
        "segments": lk.sgmv(y.clone(), x, A, B, *as_segments(ids)),
        "halves": lk.bgmv_expand(y.clone(), v, B, ids),
        "rows alone": torch.cat([lk.bgmv(y[m : m + 1].clone(), x[m : m + 1], A, B, ids[m : m + 1]) for m in range(9)])
        if M > 9
        else want,
    }
    assert not bitwise_equal(want, y)
    for form, value in got.items():
        assert bitwise_equal(value, want[: len(value)]), form


@pytest.mark.parametrize("M, L", ((0, 3), (1, 1), (50, 7), (2100, 3), (40, 0)))
@pytest.mark.parametrize("segmented", (False, True))
def test_plan(M, L, segmented):
    torch.manual_seed(M)
    ids = torch.randint(-1, L, (M,)) if L else torch.full((M,), -1)
    with lk.backend("reference"):
        want = lk.BatchPlan.from_ids(ids, L)
    if segmented and M and L:
        got = lk.BatchPlan.from_segments(*as_segments(torch.cat([ids[:-1], torch.tensor([L - 1])])), L)
        with lk.backend("reference"):
            want = lk.BatchPlan.from_ids(torch.cat([ids[:-1], torch.tensor([L - 1])]), L)
    else:
        got = lk.BatchPlan.from_ids(ids, L)
    size = 3 + L + int(want.table[2 + L])
    assert torch.equal(got.table[:size], want.table[:size])


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_gradients(name):
    sample = next(s for s in low_rank_samples(*LOW_RANK_DTYPES[name]) if s.name == "gate-up-live-ranks")

    def gradients(function, leaf):
        a = sample.make(0)
        leaves = [leaf(t.nan_to_num()) for t in (a["x"], a["y"], *a["A"], *a["B"])]
        out = function(**{**a, "x": leaves[0], "y": leaves[1], "A": tuple(leaves[2:4]), "B": tuple(leaves[4:])})
        return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))

    got = gradients(lk.multi_lora, lambda t: t.requires_grad_())
    plain = gradients(low_rank_plain, lambda t: t.requires_grad_())
    want = gradients(low_rank_oracle, lambda t: t.double().requires_grad_())
    for what, g, p, w in zip(("x", "y", "A0", "A1", "B0", "B1"), got, plain, want, strict=True):
        assert_within_rule(g, w, p, noise=2**-20 * rms(w), what=f"d{what}")


@pytest.mark.parametrize("check", strides.CHECKS)
def test_any_strides(check):
    check("cpu")
