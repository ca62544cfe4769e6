"""`bgmv_spectral`: each row with its own adapter's spectrum, against one adapter at a time."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import bitwise_equal, poison, threads

KINDS = ("fourier", "dct", "hartley", "identity", "wht", "haar")
N, K, COUNT, L, M = 24, 40, 60, 5, 37
BACKENDS = ("reference", "cpu")


def batch(dtype=torch.float32, values_dtype=torch.float32, y_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    plan = lk.SpectralPlan.random(COUNT, (N, K), seed=3)
    values = torch.randn(L, COUNT, generator=generator).to(values_dtype)
    ids = torch.randint(-1, L, (M,), generator=generator)
    x = torch.randn(M, K, generator=generator).to(dtype)
    y = torch.randn(M, N, generator=generator).to(y_dtype or dtype)
    return y, x, values, plan, ids, torch.rand(L, generator=generator) + 0.5


def one_at_a_time(y, x, values, plan, ids, scaling, kind):
    expected = y.clone()
    for l in range(L):
        rows = ids == l
        expected[rows] = lk.spectral_linear(
            x[rows], values[l], plan, kind=kind, scale=float(scaling[l]), y=y[rows].contiguous()
        )
    return expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_its_own_adapter(kind, backend):
    y, x, values, plan, ids, scaling = batch()
    with lk.backend("reference"):
        expected = one_at_a_time(y.double(), x.double(), values.double(), plan, ids, scaling, kind)
        plain = one_at_a_time(y, x, values, plan, ids, scaling, kind)
    with lk.backend(backend), poison():
        result = lk.bgmv_spectral(y, x, values, plan, ids, kind=kind, scaling=scaling)
    assert result is y
    error, yardstick = ((t.double() - expected).norm() for t in (y, plain))
    assert error <= max(1.5 * yardstick, (N + K) ** 0.5 * 2**-24 * expected.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("dct", "identity"))
def test_rows_without_an_adapter_and_other_adapters_nans_are_left_alone(kind, backend):
    y, x, values, plan, ids, _ = batch()
    values[2] = float("nan")
    ids[::3], before = -1, y.clone()
    with lk.backend(backend):
        lk.bgmv_spectral(y, x, values, plan, ids, kind=kind)
    assert bitwise_equal(y[ids < 0], before[ids < 0])
    assert y[ids == 2].isnan().any()
    assert y[ids != 2].isfinite().all()
    assert not torch.equal(y[ids == 1], before[ids == 1])


@pytest.mark.parametrize(
    "dtypes", ((torch.bfloat16, torch.float32, None), (torch.float16, torch.float16, torch.float32))
)
def test_dtypes(dtypes):
    y, x, values, plan, ids, scaling = batch(*dtypes)
    with lk.backend("reference"):
        expected = one_at_a_time(y.double(), x.double(), values.double(), plan, ids, scaling, "haar")
        plain = one_at_a_time(y, x, values, plan, ids, scaling, "haar")
    lk.bgmv_spectral(y, x, values, plan, ids, kind="haar", scaling=scaling)
    assert (y.double() - expected).norm() <= 1.05 * (plain.double() - expected).norm() + 1e-6 * expected.norm()


def test_a_row_does_not_feel_its_batch_nor_the_threads():
    y, x, values, plan, ids, _ = batch()
    alone = y.clone()
    for i in range(M):
        lk.bgmv_spectral(alone[i : i + 1], x[i : i + 1], values, plan, ids[i : i + 1], kind="fourier")
    for count in (1, 2):
        with threads(count):
            together = lk.bgmv_spectral(y.clone(), x, values, plan, ids, kind="fourier")
        assert bitwise_equal(together, alone)


def test_strided_and_3d_batches_with_int32_ids():
    y, x, values, plan, ids, _ = batch()
    expected = lk.bgmv_spectral(y.clone(), x, values, plan, ids, kind="wht", scaling=0.5)
    wide = torch.full((M, 2 * N), float("nan"))
    wide[:, ::2] = y
    lk.bgmv_spectral(
        wide[:, ::2], x.T.contiguous().T, values.double().float(), plan, ids.int(), kind="wht", scaling=0.5
    )
    assert bitwise_equal(wide[:, ::2].contiguous(), expected)
    y3 = y[:36].reshape(4, 9, N).clone()
    lk.bgmv_spectral(y3, x[:36].reshape(4, 9, K), values, plan, ids[:36], kind="wht", scaling=0.5)
    assert bitwise_equal(y3.reshape(36, N), expected[:36])


def test_no_rows_and_no_adapters():
    y, x, values, plan, ids, _ = batch()
    assert lk.bgmv_spectral(y[:0], x[:0], values, plan, ids[:0], kind="dct").shape == (0, N)
    before = y.clone()
    lk.bgmv_spectral(y, x, values[:0], plan, torch.full((M,), -1), kind="dct")
    assert bitwise_equal(y, before)


def test_y_has_a_new_version():
    y, x, values, plan, ids, _ = batch()
    before = y._version
    lk.bgmv_spectral(y, x, values, plan, ids, kind="haar")
    assert y._version > before


@pytest.mark.parametrize(
    "name, value, error, words",
    (
        ("values", torch.zeros(COUNT), ValueError, r"values must be \[L, n\]"),
        ("values", torch.zeros(L, COUNT + 1), ValueError, "values must be"),
        ("values", torch.zeros(L, COUNT, dtype=torch.bfloat16), TypeError, "values must be"),
        ("adapter_ids", torch.zeros(M - 1, dtype=torch.int64), ValueError, "adapter_ids must be"),
        ("adapter_ids", torch.zeros(M), TypeError, "adapter_ids must be int32 or int64"),
        ("adapter_ids", torch.full((M,), L), IndexError, r"adapter_ids\[0\] is 5"),
        ("scaling", torch.ones(L + 1), ValueError, "scaling must be"),
        ("x", torch.zeros(M, K + 1), ValueError, "x must be"),
        ("y", torch.zeros(M, N + 1), ValueError, "y must be"),
        ("y", torch.zeros(1, N).expand(M, N), ValueError, "expanded"),
        ("kind", "cosine", ValueError, "kind must be"),
    ),
)
def test_what_is_wrong_is_named_before_anything_is_written(name, value, error, words):
    y, x, values, plan, ids, scaling = batch()
    given = {"y": y, "x": x, "values": values, "plan": plan, "adapter_ids": ids, "kind": "dct", "scaling": scaling}
    before = y.clone()
    with pytest.raises(error, match=words):
        lk.bgmv_spectral(**{**given, name: value})
    assert bitwise_equal(y, before)


def test_it_says_that_it_is_not_differentiable():
    y, x, values, plan, ids, _ = batch()
    with pytest.raises(RuntimeError, match="spectral_linear"):
        lk.bgmv_spectral(y, x, values.requires_grad_(), plan, ids, kind="dct")
    with torch.no_grad():
        lk.bgmv_spectral(y, x, values, plan, ids, kind="dct")
