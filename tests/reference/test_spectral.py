"""The reference of `spectral` against scipy, torch.fft, PyWavelets, PEFT and explicit formulas, in float64."""

import functools
import math

import pytest
import pywt
import scipy.fft
import scipy.linalg
import torch
from peft import FourierFTConfig, WaveFTConfig
from peft.tuners.fourierft.layer import FourierFTLinear
from peft.tuners.waveft.layer import WaveFTLinear

import lora_kernels as lk
from lora_kernels.reference.hadamard import base
from lora_kernels.testing import SPECTRAL_KINDS, SPECTRAL_LEAVES, spectral_location_oracle, spectral_samples

SIZES = ((1, 1), (1, 4), (2, 1), (2, 2), (3, 4), (5, 8), (8, 20), (31, 12), (16, 28), (37, 2), (64, 40))
#: For the kinds that have a transform of every length.
ODD = (*SIZES, (3, 3), (4, 7), (13, 1), (17, 31), (30, 45), (61, 37))
FP64 = torch.float64, torch.float64


@pytest.fixture(autouse=True)
def reference():
    with lk.backend("reference"):
        yield


def sparse(N, K, n, seed=0, **options):
    """(S, values, plan) with n places, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randint(0, size, (n,), generator=generator) for size in (N, K))
    rows[n // 2 :], cols[n // 2 :] = rows[: n - n // 2].clone(), cols[: n - n // 2].clone()
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    S = torch.zeros(N, K, dtype=torch.float64)
    for p, q, value in zip(rows.tolist(), cols.tolist(), values.tolist(), strict=True):
        S[p, q] += value
    return S, values, lk.SpectralPlan(rows, cols, shape=(N, K), **options)


def check(W, values, plan, kind):
    """ΔW, x ΔWᵀ, its three gradients and ΔW's gradient, all of which a dense ΔW gives by two lines of algebra."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    (N, K), generator = plan.shape, torch.Generator().manual_seed(3)
    close(lk.spectral_delta_weight(values, plan, kind=kind), W)
    close(lk.spectral_delta_weight(values, plan, kind=kind, scale=-2.5), -2.5 * W)
    x, y, dy = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((2, 3, K), *[(2, 3, N)] * 2))
    close(lk.spectral_linear(x, values, plan, kind=kind, scale=0.5), 0.5 * x @ W.T)
    leaves = [t.clone().requires_grad_() for t in (x, values, y)]
    out = lk.spectral_linear(*leaves[:2], plan, kind=kind, scale=0.5, y=leaves[2])
    close(out, y + 0.5 * x @ W.T)
    dx, dvalues, d_y = torch.autograd.grad(out, leaves, dy)
    close(dx, 0.5 * dy @ W)
    close(d_y, dy)
    # dvalues_i is the inner product of dyᵀ x with the ΔW of coefficient i alone.
    dW = dy.reshape(-1, N).T @ x.reshape(-1, K)
    alone = [lk.spectral_delta_weight(e, plan, kind=kind) for e in torch.eye(plan.n, dtype=torch.float64)[:5]]
    close(dvalues[:5], torch.stack([0.5 * (dW * B).sum() for B in alone]))
    (of_weight,) = torch.autograd.grad(lk.spectral_delta_weight(leaves[1], plan, kind=kind, scale=0.5), leaves[1], dW)
    close(of_weight, dvalues)


@pytest.mark.parametrize("N, K", ODD)
def test_fourier_is_ifft2(N, K):
    S, values, plan = sparse(N, K, 2 * max(N, K) + 6)
    check(torch.fft.ifft2(S).real, values, plan, "fourier")


@pytest.mark.parametrize("N, K", ODD)
def test_dct_is_idctn(N, K):
    S, values, plan = sparse(N, K, 2 * max(N, K) + 6)
    check(torch.from_numpy(scipy.fft.idctn(S.numpy(), norm="ortho")), values, plan, "dct")


@pytest.mark.parametrize("N, K", ODD)
def test_hartley(N, K):
    def cas(size):
        return torch.tensor(
            [
                [math.cos(a) + math.sin(a) for j in range(size) for a in [2 * math.pi * i * j / size]]
                for i in range(size)
            ],
            dtype=torch.float64,
        ) / math.sqrt(size)

    S, values, plan = sparse(N, K, 2 * max(N, K) + 6)
    check(cas(N) @ S @ cas(K), values, plan, "hartley")


@pytest.mark.parametrize("N, K", ODD)
def test_identity(N, K):
    S, values, plan = sparse(N, K, 2 * max(N, K) + 6)
    check(S, values, plan, "identity")


@pytest.mark.parametrize("N, K", ODD)
def test_haar_is_idwt2(N, K):
    """Of odd sizes the spectrum has a row or column of zeros more, and the result is cropped."""
    S, values, plan = sparse(N, K, 2 * max(N, K) + 6)
    padded = torch.nn.functional.pad(S, (0, K % 2, 0, N % 2)).numpy()
    n, k = padded.shape[0] // 2, padded.shape[1] // 2
    assert (n, k) == ((N + 1) // 2, (K + 1) // 2)
    W = pywt.idwt2((padded[:n, :k], (padded[:n, k:], padded[n:, :k], padded[n:, k:])), "db1")
    check(torch.from_numpy(W)[:N, :K].contiguous(), values, plan, "haar")


def hadamard(K, layout):
    """H by scipy's Sylvester matrix and bases written out."""
    bases = {
        ("auto", 12): (12,), ("auto", 20): (20,), ("auto", 28): (28,), ("auto", 40): (2, 20), ("auto", 336): (12, 28),
        ("quarot", 36): (36,), ("quarot", 40): (2, 20), ("quarot", 144): (36,), ("quarot", 24): (12,),
    }.get((layout, K), ())  # fmt: skip
    factors = [base(order).double() for order in bases]
    factors.append(torch.from_numpy(scipy.linalg.hadamard(K // math.prod(bases))).double())
    return functools.reduce(torch.kron, factors)


@pytest.mark.parametrize(
    "N, K, layout",
    [(N, K, "auto") for N, K in SIZES] + [(7, 336, "auto"), (7, 24, "quarot"), (5, 144, "quarot"), (9, 40, "quarot")],
)
def test_wht_is_one_sided(N, K, layout):
    S, values, plan = sparse(N, K, 2 * max(N, K) + 6, layout=layout)
    check(S @ hadamard(K, layout) / math.sqrt(K), values, plan, "wht")


def test_wht_is_qwhas_weight():
    """α / (K √N) · F H with H of entries ±1."""
    alpha, N, K = 4000.0, 24, 28
    S, values, plan = sparse(N, K, 80, layout="quarot")
    want = alpha / (K * math.sqrt(N)) * S @ hadamard(K, "auto")
    got = lk.spectral_delta_weight(values, plan, kind="wht", scale=alpha / math.sqrt(N * K))
    torch.testing.assert_close(got, want)


PEFT_SIZES = ((24, 20, 30), (17, 31, 60), (1, 9, 9), (32, 7, 1), (64, 48, 700))


@pytest.mark.parametrize("seed", (777, 0, 12345))
@pytest.mark.parametrize("N, K, n", PEFT_SIZES)
def test_random_places_are_pefts(N, K, n, seed):
    linear, plan = torch.nn.Linear(K, N), lk.SpectralPlan.random(n, (N, K), seed)
    fourier = FourierFTLinear(linear, "default", FourierFTConfig(random_loc_seed=seed), n_frequency=n)
    wave = WaveFTLinear(linear, "default", WaveFTConfig(random_loc_seed=seed), n_frequency=n)
    for indices in (fourier.indices["default"], wave.waveft_indices["default"]):
        assert torch.equal(torch.stack((plan.rows, plan.cols)), indices)


@pytest.mark.parametrize("N, K, n", PEFT_SIZES)
def test_fourier_is_pefts(N, K, n):
    config = FourierFTConfig(scaling=150.0, init_weights=False)
    layer = FourierFTLinear(torch.nn.Linear(K, N), "default", config, n_frequency=n)
    values, plan = layer.fourierft_spectrum["default"].detach(), lk.SpectralPlan.random(n, (N, K))
    got = lk.spectral_delta_weight(values, plan, kind="fourier", scale=150.0)
    torch.testing.assert_close(got, layer.get_delta_weight("default").detach())


@pytest.mark.parametrize("kind", ("haar", "identity"))
@pytest.mark.parametrize("N, K, n", PEFT_SIZES)
def test_haar_and_identity_are_pefts(N, K, n, kind):
    config = WaveFTConfig(scaling=25.0, init_weights=False, use_idwt=kind == "haar", wavelet_family="db1")
    layer = WaveFTLinear(torch.nn.Linear(K, N), "default", config, n_frequency=n)
    values, plan = layer.waveft_spectrum["default"].detach(), lk.SpectralPlan.random(n, (N, K))
    got = lk.spectral_delta_weight(values, plan, kind=kind, scale=25.0)
    torch.testing.assert_close(got, layer.get_delta_weight("default").detach())


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("N, K", ((1, 1), (1, 8), (9, 1), (2, 2), (12, 7), (31, 40)))
def test_location_gradient_is_locas(N, K, seed):
    """½ a (K[p+1, q] - K[p-1, q]) of the dense K = C dW Dᵀ, at the edges of K's own edge, between -1 and 1."""
    _, values, plan = sparse(N, K, 30, seed)
    x, dy = torch.randn(2, 3, K, dtype=torch.float64), torch.randn(2, 3, N, dtype=torch.float64)
    for scale in (1e-3, 0.3, 5.0):
        dW = scale * dy.reshape(-1, N).T @ x.reshape(-1, K)
        dense = torch.from_numpy(scipy.fft.dctn(dW.numpy(), norm="ortho"))
        want = torch.zeros(2, 30, dtype=torch.float64)
        for i, (p, q, a) in enumerate(zip(plan.rows.tolist(), plan.cols.tolist(), values.tolist(), strict=True)):
            d_row = dense[min(p + 1, N - 1), q] - dense[max(p - 1, 0), q]
            d_col = dense[p, min(q + 1, K - 1)] - dense[p, max(q - 1, 0)]
            want[0, i], want[1, i] = (max(-1.0, min(1.0, float(a * d / 2))) for d in (d_row, d_col))
        got = lk.spectral_location_grad(dy, x, values, plan, scale=scale)
        torch.testing.assert_close(torch.stack(got), want)
        torch.testing.assert_close(got, spectral_location_oracle(dy, x, values, plan, scale=scale))
        assert (want.abs().max() == 1) == bool((want.abs() >= 1).any())
    if min(N, K) > 2:
        assert (want.abs() == 1).any(), "the clamp was not seen"


def test_location_gradient_is_the_mean_of_two_steps():
    """Half the change of the loss when a coefficient moves from one of its place's neighbours to the other."""
    N, K, p, q, a, scale = 40, 36, 11, 17, 0.3, 0.01
    x, dy = torch.randn(5, K, dtype=torch.float64), torch.randn(5, N, dtype=torch.float64)

    def loss(row, col):
        plan = lk.SpectralPlan(torch.tensor([row]), torch.tensor([col]), shape=(N, K))
        return float((dy * lk.spectral_linear(x, torch.tensor([a]).double(), plan, kind="dct", scale=scale)).sum())

    plan = lk.SpectralPlan(torch.tensor([p]), torch.tensor([q]), shape=(N, K))
    d_row, d_col = lk.spectral_location_grad(dy, x, torch.tensor([a]).double(), plan, scale=scale)
    assert float(d_row) == pytest.approx((loss(p + 1, q) - loss(p - 1, q)) / 2, rel=1e-9)
    assert float(d_col) == pytest.approx((loss(p, q + 1) - loss(p, q - 1)) / 2, rel=1e-9)


def test_the_clamp_comes_after_the_sum_of_rows():
    x, dy = torch.ones(64, 8, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
    plan = lk.SpectralPlan(torch.tensor([3]), torch.tensor([1]), shape=(8, 8))
    whole = lk.spectral_location_grad(dy, x, torch.ones(1).double() * 1e-2, plan)
    parts = [lk.spectral_location_grad(dy[i::2], x[i::2], torch.ones(1).double() * 1e-2, plan) for i in (0, 1)]
    torch.testing.assert_close(whole[1], parts[0][1] + parts[1][1])  # none reached it
    d = lk.spectral_location_grad(torch.cat((dy, -dy)), torch.cat((x, x)), torch.ones(1).double() * 1e6, plan)
    torch.testing.assert_close(d[1], torch.zeros(1, dtype=torch.float64), atol=1e-6, rtol=0)  # would else be ±1 ∓ 1


GRADCHECK = [s for s in spectral_samples(*FP64) if "large" not in s.traits and "-x-expanded" not in s.name]


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_gradcheck(kind):
    count = 0
    for sample in GRADCHECK:
        if kind not in sample.traits:
            continue
        a = sample.make(0)
        names = [n for n in SPECTRAL_LEAVES if a[n] is not None and a[n].numel()]

        def call(*tensors, a=a, names=names):
            return lk.spectral_linear(**{**a, **dict(zip(names, tensors, strict=True))})

        if a["x"].numel():
            inputs = [a[n].requires_grad_() for n in names]
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True), sample.name
            count += 1
    assert count > 25


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_gradcheck_of_the_weight(kind):
    for N, K, n in ((5, 4, 9), (12, 20, 30), (1, 1, 2)):
        _, values, plan = sparse(N, K, n)
        values.requires_grad_()
        assert torch.autograd.gradcheck(lambda v, p=plan: lk.spectral_delta_weight(v, p, kind=kind, scale=3.0), values)


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_many_entries_a_few_at_once(kind, monkeypatch):
    """More products than are held at a time."""
    from lora_kernels.reference import spectral

    _, values, plan = sparse(24, 28, 100)
    x = torch.randn(5, 28, dtype=torch.float64)

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, values)]
        y = lk.spectral_linear(*leaves, plan, kind=kind)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    want = results()
    monkeypatch.setattr(spectral, "_few_at_once", lambda count, rows: [slice(i, i + 7) for i in range(0, count, 7)])
    for got, w in zip(results(), want, strict=True):
        torch.testing.assert_close(got, w)
