"""Cosine, Hartley, Fourier and Haar transforms against independent libraries and the mathematics, in float64."""

import math

import pytest
import torch

from lora_kernels.reference.transforms import haar, trigonometric
from lora_kernels.testing import MODEL_LENGTHS, rms, transform_oracle
from lora_kernels.testing.trigonometric import haar_matrix, trigonometric_matrix
from lora_kernels.testing.trigonometric import trigonometric as oracle

FORMS = ("cosine", "hartley", "fourier")
SHORT = (*range(1, 34), 36, 45, 49, 60, 64, 81, 97, 100, 120, 127, 128, 137, 256, 343, 500, 512, 513)
LONG = (625, 1000, 1024, 1069, 2048, 4096, 4489, 9973, 16384, 32768, *MODEL_LENGTHS)
SCALES = 0.75, -1.25  # of the first row and of the others


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=3e-15 * want.shape[-1] ** 0.5 * (1 + float(want.abs().max())))


def matrix(form, N, transpose=False):
    """D T or its transpose, of the reference."""
    return trigonometric(torch.eye(N, dtype=torch.float64), form, *SCALES, transpose).T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transpose", (False, True))
def test_every_entry(form, transpose):
    """Each entry by the formula, with ``math`` alone."""
    for N in (1, 2, 3, 4, 5, 7, 8, 12, 15):
        want = doubles(*([SCALES[k > 0] * entry(form, k, j, N) for j in range(N)] for k in range(N)))
        close(matrix(form, N, transpose), want.T if transpose else want)


def entry(form, k, j, N):
    if form == "cosine":
        return math.cos(math.pi * k * (2 * j + 1) / (2 * N))
    angle = 2 * math.pi * j * k / N
    if form == "hartley":
        return math.cos(angle) + math.sin(angle)
    return math.cos(angle) if 2 * k <= N else math.sin(2 * math.pi * j * (N - k) / N)


@pytest.mark.parametrize("form", FORMS)
def test_every_short_length(form):
    """The reference's matrix is the formula's, and its transpose the transpose."""
    for N in SHORT:
        D = doubles(SCALES[0], *[SCALES[1]] * (N - 1))
        want = D[:, None] * trigonometric_matrix(form, N)
        close(matrix(form, N), want)
        close(matrix(form, N, True), want.T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transpose", (False, True))
def test_every_long_length(form, transpose):
    """Against the oracle's way, and both against the sums themselves of a few outputs."""
    for N in LONG:
        x = randn(2, N)
        got, want = trigonometric(x, form, *SCALES, transpose), oracle(x, form, *SCALES, transpose)
        close(got, want)
        for at in (0, 1, N // 3, N // 2, N // 2 + 1, N - 1):
            summed = x @ weights(form, at, N, transpose)
            torch.testing.assert_close(want[:, at], summed, rtol=0, atol=1e-11 * rms(want))


def weights(form, at, N, transpose):
    """One row of D T, or one column."""
    k, j = (torch.arange(N), torch.tensor([at])) if transpose else (torch.tensor([at]), torch.arange(N))
    D = torch.where(k > 0, SCALES[1], SCALES[0]).double()

    def angle(product, period):
        return (product % period).double() * (2 * math.pi / period)

    if form == "cosine":
        return D * angle(k * (2 * j + 1), 4 * N).cos()
    if form == "hartley":
        return D * (angle(j * k, N).cos() + angle(j * k, N).sin())
    return D * torch.where(2 * k <= N, angle(j * k, N).cos(), angle(j * (N - k), N).sin())


@pytest.mark.parametrize("form", FORMS)
def test_adjoint(form):
    """⟨T x, y⟩ = ⟨x, Tᵀ y⟩ for every length."""
    for N in (*SHORT, *LONG):
        x, y = randn(N), randn(N)
        left = trigonometric(x, form, *SCALES, False) @ y
        right = x @ trigonometric(y, form, *SCALES, True)
        assert abs(left - right) < 1e-12 * N, N


@pytest.mark.parametrize("type", (2, 3))
@pytest.mark.parametrize("norm", ("ortho", None))
@pytest.mark.parametrize("function", ("dct", "idct"))
def test_oracle_is_scipys(function, type, norm):
    """So what is held to the oracle in tests/ops has scipy's meaning, for every option and length."""
    fft = pytest.importorskip("scipy.fft")
    for N in (1, 2, 3, 4, 5, 8, 9, 17, 100, 128, 137, 512, 1069, 4096, *MODEL_LENGTHS):
        x = randn(2, N)
        want = torch.from_numpy(getattr(fft, function)(x.numpy(), type=type, norm=norm))
        close(transform_oracle(function, x, type=type, norm=norm), want)


def test_fourier_is_numpys():
    numpy = pytest.importorskip("numpy")
    for N in (1, 2, 3, 4, 5, 8, 45, 128, 137, 3072):
        x = randn(3, N)
        V = torch.from_numpy(numpy.fft.fft(x.numpy()))
        sines = [-V.imag[:, N - k] for k in range(N // 2 + 1, N)]
        want = torch.cat((V.real[:, : N // 2 + 1], torch.stack(sines, 1) if sines else V.real[:, :0]), 1)
        close(trigonometric(x, "fourier", 1.0, 1.0, False), want)


@pytest.mark.parametrize("form", ("cosine", "hartley"))
def test_orthogonality(form):
    for N in (*SHORT, *LONG):
        first = N**-0.5
        rest = first if form == "hartley" else (2 / N) ** 0.5
        x = randn(2, N)
        y = trigonometric(x, form, first, rest, False)
        close(y.norm(dim=-1), x.norm(dim=-1))
        close(trigonometric(y, form, first, rest, True), x)
        if form == "hartley":  # symmetric too, so its own inverse
            close(trigonometric(y, form, first, rest, False), x)


def test_haar_is_pywts():
    pywt = pytest.importorskip("pywt")
    for N in (2, 4, 6, 10, 64, 96, 100, 2304, 14336, 53248):
        x = randn(2, N)
        low, high = (torch.from_numpy(part) for part in pywt.dwt(x.numpy(), "haar"))
        close(haar(x, 1, False), torch.cat((low, high), -1))
        close(haar(torch.cat((low, high), -1), 1, True), torch.from_numpy(pywt.idwt(low.numpy(), high.numpy(), "haar")))
    for N, levels in ((8, 3), (96, 5), (3072, 10), (53248, 12)):
        x = randn(2, N)
        parts = [torch.from_numpy(part) for part in pywt.wavedec(x.numpy(), "haar", level=levels)]
        close(haar(x, levels, False), torch.cat(parts, -1))


HALF = math.sqrt(0.5)


def test_haar_of_odd_lengths():
    """The last number goes to the end of the low half."""
    a, b, c, d, e = range(1, 6)
    x = doubles(a, b, c, d, e)
    low, high = [(a + b) * HALF, (c + d) * HALF, e], [(a - b) * HALF, (c - d) * HALF]
    close(haar(x, 1, False), doubles(*low, *high))
    lower, next_high = [(low[0] + low[1]) * HALF, low[2]], [(low[0] - low[1]) * HALF]
    close(haar(x, 2, False), doubles(*lower, *next_high, *high))
    assert torch.equal(haar(x[:1], 1, False), x[:1])


@pytest.mark.parametrize("levels", (1, 2, 3, 9))
def test_every_short_length_of_haar(levels):
    for N in SHORT:
        M = haar_matrix(N, levels)
        eye = torch.eye(N, dtype=torch.float64)
        close(haar(eye, levels, False), M.T)
        close(haar(eye, levels, True), M)
        close(M @ M.T, eye)


@pytest.mark.parametrize("levels", (1, 3, 20))
def test_every_long_length_of_haar(levels):
    for N in LONG:
        x, y = randn(2, N), randn(2, N)
        Hx, Hty = haar(x, levels, False), haar(y, levels, True)
        close(Hx, transform_oracle("haar", x, levels=levels))
        close(Hty, transform_oracle("ihaar", y, levels=levels))
        close(haar(Hx, levels, True), x)
        assert abs((Hx * y).sum() - (x * Hty).sum()) < 1e-12 * N


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("transpose", (False, True))
def test_held_in_fp32_and_rounded_once(dtype, transpose):
    x = torch.randn(3, 5, 150).to(dtype)
    for op in (*(lambda x, form=form: trigonometric(x, form, 0.1, 0.2, transpose) for form in FORMS),
               lambda x: haar(x, 3, transpose)):  # fmt: skip
        got = op(x)
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.equal(got, op(x.float()).to(dtype))
