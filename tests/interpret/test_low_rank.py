"""The ``low_rank`` kernels in the checking interpreter, against the float64 oracle."""

import dataclasses

import guard
import layouts
import pytest
import torch

import lora_kernels as lk
from lora_kernels import select
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
    half = lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.empty(M, L).update_(ids[: M // 2]))
    assert bitwise_equal(half, torch.cat([want[: M // 2], y[M // 2 :]])), "a plan of half the rows"


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


def close(got, want, plain, what):
    assert_within_rule(got, want, plain, noise=2**-20 * rms(want), what=what)


GRADIENTS = ("gate-up-live-ranks", "qkv-shared-ranks", "listed-live-ranks", "mixture-of-3", "r100", "no-adapter")


@pytest.mark.parametrize("sample", GRADIENTS)
@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_gradients(name, sample):
    sample = next(s for s in low_rank_samples(*LOW_RANK_DTYPES[name]) if s.name == sample)

    def gradients(function, leaf):
        a = sample.make(0)
        form, count = type(a["A"]), 1 if isinstance(a["A"], torch.Tensor) else len(a["A"])
        factors = [t for f in "AB" for t in ((a[f],) if count == 1 else a[f])]
        leaves = [leaf(t.nan_to_num()) for t in (a["x"], a["y"], *factors)]
        if a["weights"] is not None:
            leaves.append(leaf(a["weights"]))
            a["weights"] = leaves[-1]
        A, B = leaves[2 : 2 + count], leaves[2 + count : 2 + 2 * count]
        A, B = (A[0], B[0]) if form is torch.Tensor else (form(A), form(B))
        out = function(**{**a, "x": leaves[0], "y": leaves[1], "A": A, "B": B})
        return torch.autograd.grad(
            out, leaves, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out), materialize_grads=True
        )

    got = gradients(lk.multi_lora, lambda t: t.requires_grad_())
    plain = gradients(low_rank_plain, lambda t: t.requires_grad_())
    want = gradients(low_rank_oracle, lambda t: t.double().requires_grad_())
    for i, (g, p, w) in enumerate(zip(got, plain, want, strict=True)):
        close(g, w, p, f"gradient {i}")


@pytest.mark.parametrize("R, slices", ((5, 1), (16, 3), (40, 1)))
@pytest.mark.parametrize("planned", (False, True))
def test_gradients_of_many_rows(R, slices, planned, monkeypatch):
    """Adapters of several tiles (short ones, to be quick), with and without one pass over dy for both gradients."""
    from lora_kernels.kernels.triton import low_rank

    for choose in (select.outer_tiles, select.expand_grad_tiles):
        short = lambda *args, choose=choose: dataclasses.replace(choose(*args), size=64)  # noqa: E731
        monkeypatch.setattr(low_rank, choose.__name__, short)
    torch.manual_seed(0)
    M, K, N, L = 170, 24, 40, 3 if planned else 1
    x, dy = torch.randn(M, K), torch.randn(M, N * slices)
    A, B = ([torch.randn(size) for _ in range(slices)] for size in ((L, R, K), (L, N, R)))
    ids = torch.randint(-1, L, (M,)) if planned else torch.zeros(M, dtype=torch.int64)
    scaling = 0.5 + torch.rand(slices, L)

    def gradients(function, cast, ids):
        leaves = [t.to(cast, copy=True).requires_grad_() for t in (x, *A, *B)]
        a, b = tuple(leaves[1 : 1 + slices]), tuple(leaves[1 + slices :])
        y = torch.zeros(M, N * slices, dtype=cast)
        return torch.autograd.grad(
            function(y=y, x=leaves[0], A=a, B=b, adapter_ids=ids, scaling=scaling), leaves, dy.to(cast)
        )

    got = gradients(lk.multi_lora, torch.float32, ids)
    assert all(map(bitwise_equal, got, gradients(lk.multi_lora, torch.float32, lk.BatchPlan.from_ids(ids, L))))
    plain = gradients(low_rank_plain, torch.float32, ids)
    with lk.backend("reference"):
        want = gradients(lk.multi_lora, torch.float64, ids)
    for i, (g, p, w) in enumerate(zip(got, plain, want, strict=True)):
        close(g, w, p, f"gradient {i}")


def test_gradients_of_wide_slices():
    """Several groups of columns of dx, into each of which all slices are summed, with ranks and scales of their own."""
    torch.manual_seed(0)
    M, K, R, L, widths = 300, 200, 5, 2, (24, 9, 8)
    x, ids = torch.randn(M, K), torch.randint(-1, L, (M,))
    A, B = [torch.randn(L, R, K) for _ in widths], [torch.randn(L, n, R) for n in widths]
    ranks, scaling = torch.tensor([[5, 3], [0, 4], [2, 5]], dtype=torch.int32), 0.5 + torch.rand(3, L)

    def gradients(cast):
        leaves = [t.to(cast, copy=True).requires_grad_() for t in (x, *A, *B)]
        y = lk.multi_lora(leaves[0], leaves[1:4], leaves[4:], ids, scaling=scaling, ranks=ranks)
        return torch.autograd.grad(y.square().sum(), leaves)

    got = gradients(torch.float32)
    with lk.backend("reference"):
        want = gradients(torch.float64)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert rms(g.double() - w) <= 2**-19 * rms(w), f"gradient {i}"


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_slices_of_many_rows(name):
    """More rows than a small batch has: x is read once for all slices."""
    torch.manual_seed(0)
    dtypes, M, K, R, L = LOW_RANK_DTYPES[name], 300, 600, 7, 2
    widths = (24, 8, 9)
    x, y = torch.randn(M, K).to(dtypes.x), torch.randn(M, sum(widths)).to(dtypes.y)
    A = tuple(torch.randn(L, R, K).to(dtypes.factors) / 25 for _ in widths)
    B = tuple(torch.randn(L, n, R).to(dtypes.factors) for n in widths)
    ranks = torch.tensor([[7, 3], [0, 5], [2, 7]], dtype=torch.int32)
    ids = torch.randint(-1, L, (M,))
    got = lk.bgmv(y.clone(), x, A, B, ids, ranks=ranks)
    column = 0
    for s, n in enumerate(widths):
        alone = lk.bgmv(y[:, column : column + n].clone(), x, A[s], B[s], ids, ranks=ranks[s])
        torch.testing.assert_close(got[:, column : column + n], alone)
        column += n
    assert not torch.equal(got, y)


ONE_KERNEL = (
    "one-row-of-nine", "odd", "runs", "qkv-shared-ranks", "qkv", "gate-up-live-ranks", "listed-live-ranks", "strided",
    "no-adapter", "mixture-of-2", "nan-rows",
)  # fmt: skip


@pytest.fixture
def one_kernel(monkeypatch):
    """A small A is read by every program of the expand, which makes v for itself."""
    from lora_kernels.kernels.triton import _device, low_rank

    monkeypatch.setattr(_device, "gpu", lambda device: select.Gpu((8, 0), recompute=1 << 20))
    launched = []
    launch = low_rank.launch
    monkeypatch.setattr(
        low_rank,
        "launch",
        lambda kernel, *rest, **named: launched.append(kernel.fn.__name__) or launch(kernel, *rest, **named),
    )
    return launched


@pytest.mark.parametrize("sample", ONE_KERNEL)
@pytest.mark.parametrize("name", ("fp32", "bf16"))
def test_one_kernel_has_the_bits_of_two(name, sample, request):
    sample = next(s for s in low_rank_samples(*LOW_RANK_DTYPES[name]) if s.name == sample)
    want = lk.bgmv(**sample.make(0))
    launched = request.getfixturevalue("one_kernel")
    assert bitwise_equal(lk.bgmv(**sample.make(0)), want)
    assert launched == (["shrink_kernel", "expand_kernel"] if "mixture" in sample.traits else ["add_kernel"])


def test_one_kernel_of_packed_factors(one_kernel):
    layouts.packed("cpu")
    assert "add_kernel" in one_kernel


@pytest.mark.parametrize("live", (8, 16))
@pytest.mark.parametrize("M", (12, 300))
def test_bytes_follow_the_live_ranks(M, live):
    """Each adapter in use is read once a tile, as far as its live rank (B in eights); others not at all."""
    K, N, R, L = 512, 256, 16, 8
    x, y, A, B = torch.randn(M, K), torch.zeros(M, N), torch.randn(L, R, K), torch.randn(L, N, R)
    ranks = torch.full((L,), live, dtype=torch.int32)
    plan = lk.BatchPlan.from_ids(torch.arange(M) % 4 * 2, L)
    with guard.counting(A, B, y) as read:
        lk.bgmv(y, x, A, B, plan, ranks=ranks)
    tiles = {12: 4, 300: 12}[M]
    assert read(A) == tiles * live * K * 4
    assert read(B) == tiles * live * N * 4
    assert read(y) == M * N * 4


@pytest.mark.parametrize("check", layouts.CHECKS)
def test_any_layout(check):
    check("cpu")
