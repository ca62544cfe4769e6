"""SpectralPlan: what it keeps, where it goes, what it is worth after a copy, a move and a change of its inputs."""

import copy
import pickle

import pytest
import torch

import lora_kernels as lk
from lora_kernels.reference.spectral import Entries, length_of
from lora_kernels.testing import SPECTRAL_KINDS, bitwise_equal, spectral_oracle, spectral_samples


def a_plan(N=24, K=20, n=30, **options):
    places = torch.randint(0, N * K, (n,))
    return lk.SpectralPlan(places // K, places % K, shape=(N, K), **options)


def same(a, b, kind="dct"):
    return (
        torch.equal(a.rows, b.rows) and torch.equal(a.cols, b.cols) and (a.shape, a.layout) == (b.shape, b.layout)
        and all(map(torch.equal, a.entries(kind), b.entries(kind)))
    )  # fmt: skip


def test_what_it_says():
    plan = a_plan()
    assert (plan.n, plan.shape, plan.layout, plan.device) == (30, (24, 20), "auto", torch.device("cpu"))
    assert repr(plan) == "SpectralPlan(n=30, shape=(24, 20), layout='auto', device=cpu)"
    assert lk.SpectralPlan(plan.rows, plan.cols, shape=torch.Size([24, 20])).shape == (24, 20)
    assert lk.SpectralPlan(plan.rows, plan.cols, shape=[24, 20]).shape == (24, 20)


def test_values_stand_where_they_are_said_to():
    plan, values = a_plan(), torch.randn(30)
    S = torch.zeros(24, 20).index_put((plan.rows, plan.cols), values, accumulate=True)
    torch.testing.assert_close(lk.spectral_delta_weight(values, plan, kind="identity"), S)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_entries(kind):
    """Sorted by row, then by column, and by column, then by row: int32, the same entries in both, kept."""
    for shape in ("primes", "tall", "all-places", "duplicates", "no-coefficients", "all-ones"):
        (sample,) = (s for s in spectral_samples() if s.name == f"{kind}-{shape}")
        plan = sample.make(0)["plan"]
        found = []
        for packed, size in zip(plan.entries(kind), plan.shape, strict=True):
            assert packed.dtype == torch.int32
            assert packed.is_contiguous()
            rows = length_of(kind, size)
            entries = Entries.of(packed, rows)
            assert entries.starts[0] == 0
            assert entries.starts[-1] == len(entries.columns)
            assert (entries.starts.diff() >= 0).all()
            order = list(zip(entries.rows.tolist(), entries.columns.tolist(), strict=True))
            assert order == sorted(order)
            assert all(p < rows for p, _ in order)
            found.append(zip(order, entries.coefficients.tolist(), strict=True))
        by_row, by_column = (sorted(pairs) for pairs in found)
        assert by_row == sorted(((p, q), i) for (q, p), i in by_column)
        assert {i if i >= 0 else ~i for _, i in by_row} == set(range(plan.n))
        assert plan.entries(kind) is plan.entries(kind), "made once"


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_one_plan_serves_every_kind(kind, route):
    """What it keeps for one kind is not taken for another."""
    plan, values, x = a_plan(), torch.randn(30), torch.randn(3, 20)
    fresh = lk.SpectralPlan(plan.rows, plan.cols, shape=plan.shape)
    want = lk.spectral_linear(x, values, fresh, kind=kind)
    for other in (*SPECTRAL_KINDS, kind):
        lk.spectral_linear(x, values, plan, kind=other)
        lk.spectral_delta_weight(values, plan, kind=other)
    assert bitwise_equal(lk.spectral_linear(x, values, plan, kind=kind), want)
    assert len({float(lk.spectral_linear(x, values, plan, kind=k).sum()) for k in SPECTRAL_KINDS}) == 6


@pytest.mark.parametrize("used", (False, True))
@pytest.mark.parametrize(
    "again",
    (copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan)), lambda plan: plan.to("cpu")),
    ids=("copy", "deepcopy", "pickle", "to"),
)
def test_copies(again, used):
    plan = a_plan(32, 36, layout="quarot")
    if used:
        plan.entries("dct")
        plan.hadamard("wht")
    assert same(again(plan), plan)
    values, x = torch.randn(30), torch.randn(3, 36)
    for kind in SPECTRAL_KINDS:
        want = lk.spectral_linear(x, values, plan, kind=kind)
        assert bitwise_equal(lk.spectral_linear(x, values, again(plan), kind=kind), want)


def test_to():
    plan = a_plan()
    assert plan.to("cpu") is plan
    assert plan.to(torch.device("cpu")) is plan
    away = plan.to("meta")
    assert (away.device.type, away.shape, away.n, away.layout) == ("meta", plan.shape, plan.n, plan.layout)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_on_meta_there_are_shapes_only(kind):
    plan, values = a_plan().to("meta"), torch.empty(30, device="meta", requires_grad=True)
    x = torch.empty(2, 3, 20, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = lk.spectral_linear(x, values, plan, kind=kind)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 24), torch.bfloat16)
    dx, dvalues = torch.autograd.grad(y, (x, values), torch.empty_like(y))
    assert (dx.shape, dx.dtype, dvalues.shape, dvalues.dtype) == (x.shape, x.dtype, values.shape, values.dtype)
    W = lk.spectral_delta_weight(values, plan, kind=kind, dtype=torch.float16)
    assert (W.device.type, W.shape, W.dtype) == ("meta", (24, 20), torch.float16)
    (dvalues,) = torch.autograd.grad(W, values, torch.empty_like(W))
    assert dvalues.shape == values.shape
    if kind == "dct":
        d_rows, d_cols = lk.spectral_location_grad(y, x, values, plan)
        assert d_rows.shape == d_cols.shape == values.shape


def test_changes_of_what_it_was_made_from_do_not_reach_it():
    rows, cols = torch.randint(0, 24, (30,)), torch.randint(0, 20, (30,))
    plan, kept = (
        lk.SpectralPlan(rows, cols, shape=(24, 20)),
        lk.SpectralPlan(rows.clone(), cols.clone(), shape=(24, 20)),
    )
    rows.fill_(10**6)
    cols.fill_(-7)
    assert same(plan, kept)


def test_strided_places():
    places = torch.stack((torch.randint(0, 24, (30,)), torch.randint(0, 20, (30,))), 1)
    plan = lk.SpectralPlan(places[:, 0], places[:, 1], shape=(24, 20))
    assert same(plan, lk.SpectralPlan(*places.T.contiguous(), shape=(24, 20)))
    one = torch.tensor([3]).expand(5)
    assert same(lk.SpectralPlan(one, one, shape=(24, 20)), lk.SpectralPlan(one.clone(), one.clone(), shape=(24, 20)))


def test_random_is_kept_and_repeats():
    plan = lk.SpectralPlan.random(50, (24, 20))
    assert lk.SpectralPlan.random(50, (24, 20)) is plan
    assert lk.SpectralPlan.random(50, [24, 20], 777) is plan
    assert len({(p, q) for p, q in zip(plan.rows.tolist(), plan.cols.tolist(), strict=True)}) == 50
    for other in ((50, (24, 20), 778), (50, (20, 24)), (49, (24, 20))):
        assert not torch.equal(lk.SpectralPlan.random(*other).cols[:49], plan.cols[:49]) or other[0] == 49
    assert torch.equal(lk.SpectralPlan.random(49, (24, 20)).rows, plan.rows[:49])
    whole = lk.SpectralPlan.random(6, (2, 3))
    assert sorted(zip(whole.rows.tolist(), whole.cols.tolist(), strict=True)) == [
        (p, q) for p in (0, 1) for q in range(3)
    ]


def test_random_advances_no_generator_and_takes_little_memory():
    before = torch.get_rng_state()
    plan = lk.SpectralPlan.random(5, (251, 241), 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert plan.rows.untyped_storage().nbytes() == plan.cols.untyped_storage().nbytes() == 5 * 8


def test_random_whatever_is_on_where_it_is_drawn():
    """Inference mode, a default device, fake tensors: what is kept is a plan for everybody."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for i, mode in enumerate((torch.inference_mode(), torch.device("meta"), FakeTensorMode())):
        with mode:
            plan = lk.SpectralPlan.random(20 + i, (12, 10), 5)
        assert type(plan.rows) is torch.Tensor
        assert plan.device.type == "cpu"
        values = torch.randn(20 + i, requires_grad=True)
        lk.spectral_linear(torch.randn(3, 10), values, plan, kind="fourier").square().sum().backward()
        assert values.grad.abs().max() > 0


def test_a_default_device_does_not_move_what_is_kept():
    plan = a_plan()
    with torch.device("meta"):
        kept = [plan.entries(kind) for kind in SPECTRAL_KINDS]
        signs, _ = plan.hadamard("wht")
    assert {t.device.type for pair in kept for t in pair} | {signs.device.type} == {"cpu"}


@pytest.mark.parametrize("layout, K, orders", (("auto", 28, (28,)), ("auto", 64, ()), ("quarot", 36, (36,))))
def test_layouts(layout, K, orders):
    plan = a_plan(12, K, layout=layout)
    signs, found = plan.hadamard("wht")
    assert found == orders
    assert (signs is None) == (not orders)
    assert plan.hadamard("dct") == (None, ())


def test_layouts_give_their_own_matrix():
    """Of order 176 QuaRot has none; of 36 there is one, and "auto" is the same."""
    x, values = torch.randn(3, 36), torch.randn(30)
    auto = a_plan(12, 36)
    quarot = lk.SpectralPlan(auto.rows, auto.cols, shape=auto.shape, layout="quarot")
    got = [lk.spectral_linear(x, values, plan, kind="wht") for plan in (auto, quarot)]
    assert bitwise_equal(*got)
    torch.testing.assert_close(got[1].double(), spectral_oracle(x, values, quarot, kind="wht"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="QuaRot has no Hadamard matrix of order 176"):
        lk.spectral_linear(torch.randn(3, 176), values, a_plan(12, 176, layout="quarot"), kind="wht")
