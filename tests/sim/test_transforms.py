"""The CUDA kernels of ``transforms`` on the host executor, against the float64 oracle."""

import functools

import pytest
import torch

import lora_kernels as lk
from lora_kernels import _sim
from lora_kernels.reference.hadamard import orders_of
from lora_kernels.testing import (
    TRANSFORM_DTYPES,
    assert_within_rule,
    bitwise_equal,
    wht_noise,
    wht_oracle,
    wht_plain,
    wht_samples,
)

#: The long rows in one dtype alone.
SAMPLES = [
    pytest.param(sample, id=f"{name}-{sample.name}")
    for name, dtype in TRANSFORM_DTYPES.items()
    for sample in wht_samples(dtype)
    if "odd" not in sample.traits and (name == "bf16" or "large" not in sample.traits)
]


@functools.cache
def expected(sample):
    a = sample.make(0)
    return wht_oracle(**a), wht_plain(**a), wht_noise(**a)


@pytest.mark.parametrize("sample", SAMPLES)
def test_wht(sample):
    """Within the rule, and the same bits in whatever order threads run."""
    oracle, plain, noise = expected(sample)
    results = []
    for seed in range(5):
        _sim.set_seed(seed)
        with lk.backend("sim"):
            results.append(lk.wht(**sample.make(0)))
    assert_within_rule(results[0], oracle, plain, noise=noise, what=sample.name)
    for other in results[1:]:
        assert bitwise_equal(other, results[0])


@pytest.mark.parametrize(
    "length", [2**k * n for n in (1, 12, 20, 28, 44, 144) for k in range(1, 11) if 40 != 2**k * n < 50000]
)
def test_every_plan_of_passes(length):
    """Each power of two beside no base, one and two: its passes differ."""
    x = torch.randn(3, length)
    for transpose in (False, True):
        a = {"x": x, "transpose": transpose}
        with lk.backend("sim"):
            y = lk.wht(**a)
        assert_within_rule(y, wht_oracle(**a), wht_plain(**a), noise=wht_noise(**a), what=str(length))


def test_a_row_does_not_depend_on_the_others():
    x = torch.randn(40, 96)
    with lk.backend("sim"):
        y = lk.wht(x)
        assert bitwise_equal(lk.wht(x[3:4]), y[3:4])
        assert bitwise_equal(lk.wht(x[-1]), y[-1])


def test_unaligned_pairs():
    """A row that starts at an odd element, and rows an odd number of elements apart."""
    for length in (64, 1024, 480):
        numbers = torch.randn(5 * (length + 1) + 1).bfloat16()
        for x in (numbers[1 : 1 + 2 * length].reshape(2, length), numbers[:-1].reshape(5, length + 1)[:, :length]):
            with lk.backend("sim"):
                assert bitwise_equal(lk.wht(x), lk.wht(x.contiguous()))


def test_gradient():
    x = torch.randn(3, 352, requires_grad=True)
    dy = torch.randn(3, 352)
    with lk.backend("sim"):
        y = lk.wht(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.double(), wht_oracle(dy, transpose=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", (1024, 2048, 4096, 8192, 16384, 32768, 3072, 3584, 5120, 14336, 28672))
def test_no_bank_conflicts(length):
    """The 16 lanes of one 8-byte access meet each of the 16 pairs of banks once, in every pass."""
    passes = _sim.hadamard_places(length, orders_of(length))
    assert len(passes) == (4 if length == 5120 else 3)  # 5120 is 2 x 20 x 2^7
    for values in passes:
        for places in values:
            for half in (places[:16], places[16:]):
                assert len({place // 8 % 16 for place in half}) == 16


def test_refused():
    for x in (torch.randn(2, 12), torch.randn(2, 64, dtype=torch.float64), torch.randn(1, 65536)):
        with lk.backend("sim"), pytest.raises(RuntimeError, match="the CUDA kernel takes no"):
            lk.wht(x)
