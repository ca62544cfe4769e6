"""QWHA's initialisation against the paper's formulas in float64, one output channel at a time."""

import math

import pytest
import torch

import lora_kernels as lk
from lora_kernels.init import _gathered, ada_alloc, qwha_init
from lora_kernels.testing import assert_within_rule, bitwise_equal, wht_oracle

DAMPING = 1e-4


def inputs(N, K, tokens=None, dtype=torch.float32, outliers=0):
    """A residual whose rows differ in size, and the Gram matrix of inputs some of whose channels are much larger."""
    residual = (torch.randn(N, K) * torch.rand(N, 1).add(0.1)).to(dtype)
    X = torch.randn(tokens or 3 * K, K, dtype=torch.float64) * torch.rand(K, dtype=torch.float64).mul(2).exp()
    X[:, :outliers] *= 50
    return residual, (X.T @ X).to(dtype)


def roots(K, gram, damping=DAMPING, layout="auto", dtype=torch.float64):
    """H, and R with R Rᵀ = gram, damped."""
    H = wht_oracle(torch.eye(K, dtype=torch.float64), layout=layout).T.to(dtype)
    gram = torch.eye(K, dtype=dtype) if gram is None else gram.to(dtype)
    values, vectors = torch.linalg.eigh(gram + damping * gram.diagonal().mean() * torch.eye(K, dtype=dtype))
    return H, vectors * values.clamp(min=0).sqrt()


def allocation(norms, n, K, t):
    """One coefficient at a time where the floors leave any."""
    counts = [min(math.floor(n * s), K) for s in (norms**t / (norms**t).sum()).tolist()]
    while n - sum(counts):
        below = [i for i, p in enumerate(counts) if p < K]
        even = (n - sum(counts)) // len(below)
        for i in below:
            counts[i] = min(counts[i] + even, K)
        if not even:
            for i in sorted(below, key=lambda i: counts[i])[: n - sum(counts)]:
                counts[i] += 1
    return counts


def channel_by_channel(residual, n, gram=None, t=1.0, layout="auto", scale=1.0, damping=DAMPING):
    """(rows, cols, values) by the paper's equations in float64."""
    K = residual.shape[1]
    H, R = roots(K, gram, damping if gram is not None else 0.0, layout)
    B, v = H @ R, residual.double() @ R
    x0 = torch.linalg.solve(B.T, v.T).T
    rows, cols = [], []
    for i, p in enumerate(allocation(v.norm(dim=1), n, K, t)):
        chosen = (B.square().sum(1) * x0[i].square()).argsort(descending=True)[:p].sort().values
        rows.append(torch.full((p,), i))
        cols.append(chosen)
    rows, cols = torch.cat(rows), torch.cat(cols)
    return rows, cols, values_of(rows, cols, residual.double(), B, R) / scale


def values_of(rows, cols, residual, B, R):
    """The least-squares values at places, row by row, in the dtype of B and R."""
    values, v = B.new_empty(len(rows)), residual.to(B.dtype) @ R
    for i in rows.unique():
        mine = rows == i
        chosen = B[cols[mine]]
        values[mine] = torch.linalg.solve(chosen @ chosen.T, chosen @ v[i])
    return values


def errors(residual, init, gram, scale=1.0, damping=0.0, values=None):
    """‖(residual - ΔW) R‖² of each row."""
    _, R = roots(residual.shape[1], gram, damping)
    values = init.values.double() if values is None else values
    delta = lk.spectral_delta_weight(values, init.plan, kind="wht", scale=scale)
    return ((residual.double() - delta) @ R).square().sum(1)


@pytest.mark.parametrize(
    "N, K, n, options",
    [
        (12, 32, 90, {}),
        (12, 32, 90, {"t": 0.5, "scale": 0.3}),
        (7, 24, 60, {"layout": "quarot", "damping": 0.01}),
        (5, 128, 400, {"t": 0.0}),
        (9, 20, 9, {"t": 2.0}),
        (6, 16, 96, {}),
    ],
)
@pytest.mark.parametrize("with_gram", (True, False))
def test_is_the_papers_in_float64(N, K, n, options, with_gram):
    residual, gram = inputs(N, K, dtype=torch.float64)
    gram = gram if with_gram else None
    init = qwha_init(residual, n, gram=gram, **options)
    rows, cols, values = channel_by_channel(residual, n, gram, **options)
    assert init.values.dtype == torch.float64
    assert torch.equal(init.plan.rows, rows)
    assert torch.equal(init.plan.cols, cols)
    torch.testing.assert_close(init.values, values, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("K, n, tokens, outliers", [(64, 500, None, 0), (160, 2000, None, 2), (128, 900, 40, 0)])
def test_is_as_exact_in_float32_as_a_loop_is(K, n, tokens, outliers):
    """Also of Gram matrices that are far from well conditioned."""
    residual, gram = inputs(16, K, tokens, outliers=outliers)
    init = qwha_init(residual, n, gram=gram)
    rows, cols = init.plan.rows, init.plan.cols
    both = []
    for dtype in (torch.float64, torch.float32):
        H, R = roots(K, gram, dtype=dtype)
        both.append(values_of(rows, cols, residual, H @ R, R))
    assert init.values.dtype == torch.float32
    assert init.report.lifted == 0
    assert_within_rule(init.values, *both)


def test_the_values_are_optimal_and_no_row_is_worse_for_it():
    residual, gram = inputs(16, 64, outliers=1)
    init = qwha_init(residual, 300, gram=gram, scale=0.7)
    x0 = wht_oracle(residual.double())[init.plan.rows, init.plan.cols] / 0.7
    for damping in (0.0, DAMPING):
        assert (errors(residual, init, gram, 0.7, damping) <= errors(residual, init, gram, 0.7, damping, x0)).all()
    best = errors(residual, init, gram, 0.7, DAMPING).sum()
    values = init.values.double().requires_grad_()
    loss = errors(residual, init, gram, 0.7, DAMPING, values).sum()
    (slope,) = torch.autograd.grad(loss, values)
    (slope0,) = torch.autograd.grad(errors(residual, init, gram, 0.7, DAMPING, x0.requires_grad_()).sum(), x0)
    assert slope.norm() < 1e-4 * slope0.norm()
    for _ in range(5):
        other = init.values.double() * (1 + 0.01 * torch.randn(300, dtype=torch.float64))
        assert errors(residual, init, gram, 0.7, DAMPING, other).sum() > best


def test_the_report_says_what_was_reached():
    residual, gram = inputs(16, 64)
    init = qwha_init(residual, 300, gram=gram, scale=2.0)
    x0 = wht_oracle(residual.double())[init.plan.rows, init.plan.cols] / 2
    whole = errors(residual, init, gram, 2.0, DAMPING, torch.zeros_like(x0)).sum()
    for said, values in ((init.report.before, x0), (init.report.after, init.values.double())):
        found = (errors(residual, init, gram, 2.0, DAMPING, values).sum() / whole).sqrt()
        assert abs(said - found) < 1e-5
    assert init.report.after < 0.98 * init.report.before
    assert torch.equal(init.report.counts, init.plan.rows.bincount(minlength=16))


@pytest.mark.parametrize("fmt", ("nf4", "int4"))
def test_makes_up_for_quantisation(fmt):
    weight, X = torch.randn(48, 64), torch.randn(200, 64) * torch.rand(64).mul(3).exp()
    lost = weight - lk.dequantize(lk.quantize(weight, fmt, group_size=32), torch.float32)
    left = []
    for gram in (None, X.T @ X):
        init = qwha_init(lost, 8 * (48 + 64), gram=gram)
        delta = lk.spectral_delta_weight(init.values, init.plan, kind="wht")
        left.append(float((X @ (lost - delta).T).norm() / (X @ lost.T).norm()))
    assert left[1] < left[0] < 0.8
    assert left[1] == pytest.approx(init.report.after, rel=1e-2)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_inputs_are_taken_as_their_numbers(dtype):
    residual, gram = inputs(8, 32)
    residual, gram = residual.to(dtype), (gram / gram.max()).to(dtype)
    got, want = qwha_init(residual, 70, gram=gram), qwha_init(residual.float(), 70, gram=gram.float())
    assert got.values.dtype == torch.float32
    assert bitwise_equal(got.values, want.values)
    assert torch.equal(got.plan.cols, want.plan.cols)


def test_is_the_same_twice_and_however_rows_are_grouped(monkeypatch):
    residual, gram = inputs(24, 128)
    first, again = (qwha_init(residual, 1500, gram=gram) for _ in range(2))
    assert bitwise_equal(first.values, again.values)
    for at_once, spread, block in ((1, 1.0, 64), (1 << 30, 100.0, 16), (1 << 14, 1.1, 7)):
        monkeypatch.setattr(_gathered, "AT_ONCE", {"cpu": at_once})
        monkeypatch.setattr(_gathered, "SPREAD", spread)
        monkeypatch.setattr(_gathered, "BLOCK", block)
        other = qwha_init(residual, 1500, gram=gram)
        assert torch.equal(other.plan.cols, first.plan.cols)
        torch.testing.assert_close(other.values, first.values, rtol=1e-4, atol=1e-5)


def test_singular_systems_are_damped_until_they_can_be_solved():
    """Of 5 tokens, without damping; among rows that need none."""
    residual, gram = inputs(8, 64, tokens=5)
    residual[0] *= 1e-6
    init = qwha_init(residual, 200, gram=gram, damping=0.0)
    assert 0 < init.report.lifted < 8
    assert init.values.isfinite().all()
    x0 = wht_oracle(residual.double())[init.plan.rows, init.plan.cols]
    after, before = errors(residual, init, gram), errors(residual, init, gram, values=x0)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.1 * before.sum()


def test_a_residual_of_zeros():
    init = qwha_init(torch.zeros(4, 8), 10, gram=torch.eye(8))
    assert not init.values.any()
    assert init.report.counts.tolist() == [3, 3, 2, 2]
    assert init.report.before == init.report.after == 0.0


@pytest.mark.parametrize(
    "norms, n, most, t, want",
    [
        ([1.0, 1.0, 2.0], 8, 10, 1.0, [2, 2, 4]),
        ([1.0, 1.0, 2.0], 10, 10, 1.0, [3, 2, 5]),  # one is left by the floors: the first of the fewest
        ([1.0, 3.0, 4.0], 16, 5, 1.0, None),  # more than there is room for
        ([1.0, 3.0, 4.0], 14, 5, 1.0, [4, 5, 5]),  # 1.75, 5.25, 7: one and then one more, of what is left
        ([1.0, 4.0, 4.0], 9, 10, 0.5, [2, 4, 3]),
        ([1.0, 4.0, 4.0], 9, 10, 0.0, [3, 3, 3]),
        ([0.0, 0.0], 3, 4, 1.0, [2, 1]),
        ([0.0, 5.0, 0.0], 4, 3, 1.0, [1, 3, 0]),
        ([1e-30, 1e30], 4, 4, 2.0, [0, 4]),
    ],
)
def test_ada_alloc(norms, n, most, t, want):
    norms = torch.tensor(norms, dtype=torch.float64)
    if want is None:
        with pytest.raises(ValueError, match="n must be from 0 to 15 for 3 rows of at most 5, got 16"):
            ada_alloc(norms, n, most, t)
        return
    assert ada_alloc(norms, n, most, t).tolist() == want


@pytest.mark.parametrize("t", (0.0, 0.5, 1.0, 3.0))
def test_ada_alloc_gives_all_and_never_more_than_a_row_holds(t):
    norms = torch.rand(40, dtype=torch.float64) ** 6
    for n in (0, 1, 39, 40, 500, 40 * 32 - 1, 40 * 32):
        counts = ada_alloc(norms, n, 32, t)
        assert counts.sum() == n
        assert 0 <= counts.min() <= counts.max() <= 32
        assert counts.tolist() == allocation(norms, n, 32, t)


def spoilt(value, at=(1, 2), shape=(4, 8)):
    t = torch.eye(*shape)
    t[at] = value
    return t


W = torch.ones(4, 8)


@pytest.mark.parametrize(
    "call, error, match",
    [
        ({"residual": [1.0]}, TypeError, "residual must be a tensor, got list"),
        ({"residual": W.long()}, TypeError, "residual must be float32"),
        ({"residual": W[0]}, ValueError, r"residual must be \[N, K\], got \[8\]"),
        ({"residual": W[:, :0]}, ValueError, r"residual must be \[N, K\], got \[4, 0\]"),
        ({"residual": spoilt(math.nan)}, ValueError, r"residual must hold finite numbers, but residual\[1, 2\] is nan"),
        ({"residual": spoilt(-math.inf)}, ValueError, r"residual\[1, 2\] is -inf"),
        ({"residual": torch.ones(4, 6)}, ValueError, "no Hadamard matrix of order 6"),
        ({"residual": torch.ones(4, 76), "layout": "quarot"}, ValueError, "QuaRot has no Hadamard matrix of order 76"),
        ({"layout": "dao"}, ValueError, "layout must be 'auto' or 'quarot', got 'dao'"),
        ({"n": 0}, ValueError, r"n must be from 1 to 32 for a residual \[4, 8\], got 0"),
        ({"n": 33}, ValueError, "n must be from 1 to 32"),
        ({"n": 2.0}, TypeError, "n must be an int, got float"),
        ({"t": -1.0}, ValueError, "t must be finite and 0 or more, got -1.0"),
        ({"t": math.inf}, ValueError, "t must be finite"),
        ({"damping": -1e-4}, ValueError, "damping must be finite and 0 or more"),
        ({"scale": 0.0}, ValueError, "scale must be finite and not 0, got 0.0"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"gram": torch.eye(4)}, ValueError, r"gram must be \[8, 8\] for a residual \[4, 8\], got \[4, 4\]"),
        ({"gram": torch.eye(8).long()}, TypeError, "gram must be float32"),
        ({"gram": torch.eye(8, device="meta")}, ValueError, "gram is on meta, residual on cpu"),
        (
            {"gram": spoilt(math.nan, shape=(8, 8))},
            ValueError,
            r"gram must hold finite numbers, but gram\[1, 2\] is nan",
        ),
        ({"gram": spoilt(0.5, shape=(8, 8))}, ValueError, "gram must be symmetric"),
        ({"gram": spoilt(-2.0, (3, 3), (8, 8))}, ValueError, r"positive semi-definite, but gram\[3, 3\] is -2"),
        ({"gram": torch.zeros(8, 8)}, ValueError, "gram is zero"),
        ({"gram": 10 * torch.ones(8, 8) - 9.5 * torch.eye(8), "n": 32}, ValueError, "has a negative eigenvalue"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        qwha_init(**{"residual": W, "n": 4, **call})
