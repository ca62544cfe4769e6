"""Hadamard matrices and the reference transform against the mathematics, in float64."""

import functools
import hashlib
import math

import pytest
import torch

from lora_kernels.reference import hadamard
from lora_kernels.reference.transforms import hadamard as transform
from lora_kernels.testing import wht_oracle
from lora_kernels.testing.transforms import sylvester, wht_factors

BASES = [order for order in range(4, 700, 4) if hadamard.is_base(order)]
#: The lengths of the layers of Gemma, Qwen, Llama, Mistral and GLM, with the orders of their cheapest products.
MODELS = {
    2304: (36,), 2560: (2, 20), 3072: (12,), 3584: (28,), 4864: (76,), 5120: (2, 20), 5376: (12, 28), 8960: (140,),
    9728: (76,), 11008: (172,), 13696: (428,), 13824: (108,), 14336: (28,), 17408: (68,), 18944: (148,),
    21504: (12, 28), 25600: (20, 20), 27648: (108,), 28672: (28,), 29568: (12, 28, 44), 53248: (52,),
}  # fmt: skip
#: SHA-256, its first 16 digits, of QuaRot's tables, one byte an entry, 1 where it is -1.
QUAROT = {
    12: "54df67318690088f", 20: "37d018dea3176974", 28: "7b673ecbec0cbab8", 36: "6f5c22a468e795e2",
    40: "64541f028edd6517", 52: "7bf3f1e1d0d053b0", 60: "228f7202005d3fc5", 108: "2deb9bf1dfe564ed",
    140: "a7cb0daeba23e331", 156: "c69de7aeab1361f6", 172: "37fe15d0d22fac4a",
}  # fmt: skip


@pytest.mark.parametrize("order", BASES)
def test_base_is_a_hadamard_matrix(order):
    H = hadamard.base(order).double()
    assert H.abs().eq(1).all()
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.float64))


def test_which_orders_are_bases():
    assert {12, 20, 28, 36, 44, 52, 92, 100, 116, 156, 172, 188, 236, 244, 428} <= set(BASES)
    missing = [order for order in range(4, 260, 4) if not _constructible(order)]
    assert not missing
    assert not hadamard.is_base(260)
    assert not hadamard.is_base(14)


def _constructible(length):
    try:
        hadamard.orders_of(length)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("order", sorted(QUAROT))
def test_quarots_tables(order):
    orders = hadamard.orders_of(order if order == 20 else 4 * order, "quarot")
    H = functools.reduce(torch.kron, map(hadamard.base, orders))
    assert H.shape[0] == order
    assert hashlib.sha256((H < 0).to(torch.uint8).numpy().tobytes()).hexdigest()[:16] == QUAROT[order]


def test_quarots_order():
    """The bases that QuaRot's chain of remainders finds, 40 as 2 and 20."""
    chain = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)
    for length in (n * 2**m for n in (1, 3, 5, 7, 9, 13, 15, 27, 35, 39, 43) for m in range(2, 9)):
        order = next((k for k in chain if length % k == 0), 1)
        assert math.prod(hadamard.orders_of(length, "quarot")) == order


@pytest.mark.parametrize("length", (0, 3, 6, 10, 84, 516, 4864, 13696))
def test_no_quarot(length):
    with pytest.raises(ValueError, match=rf"\b{length}\b"):
        hadamard.orders_of(length, "quarot")


@pytest.mark.parametrize("length", (-4, 0, 3, 6, 7, 14, 260, 1044 * 1021))
def test_none_is_known(length):
    with pytest.raises(ValueError, match=rf"order {length} "):
        hadamard.orders_of(length)


@pytest.mark.parametrize("length", MODELS)
def test_lengths_of_models(length):
    orders = hadamard.orders_of(length)
    assert orders == MODELS[length]
    x = torch.randn(2, length, dtype=torch.float64)
    signs = hadamard.signs_of(orders, x.device)
    y = transform(x, signs, orders, length**-0.5, False)
    torch.testing.assert_close(y, wht_oracle(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(transform(y, signs, orders, length**-0.5, True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", (1, 2, 4, 8, 64, 512))
def test_powers_of_two(length):
    H = transform(torch.eye(length, dtype=torch.float64), None, (), 1.0, False)
    assert torch.equal(H, sylvester(length))
    linalg = pytest.importorskip("scipy.linalg")
    assert torch.equal(H, torch.from_numpy(linalg.hadamard(length)).double())


@pytest.mark.parametrize("layout", ("auto", "quarot"))
@pytest.mark.parametrize("length", (12, 24, 40, 144, 208, 216, 344))
@pytest.mark.parametrize("transpose", (False, True))
def test_dense(length, layout, transpose):
    H = functools.reduce(torch.kron, wht_factors(length, layout))
    orders = hadamard.orders_of(length, layout)
    eye = torch.eye(length, dtype=torch.float64)
    got = transform(eye, hadamard.signs_of(orders, eye.device), orders, 1.0, transpose)
    assert torch.equal(got, H if transpose else H.T)
    assert torch.equal(H @ H.T, length * eye)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_held_in_fp32_and_rounded_once(dtype):
    x = torch.randn(3, 5, 160).to(dtype)
    orders = hadamard.orders_of(160)
    got = transform(x, hadamard.signs_of(orders, x.device), orders, 160**-0.5, False)
    wide = transform(x.float(), hadamard.signs_of(orders, x.device), orders, 160**-0.5, False)
    assert got.dtype == dtype
    assert torch.equal(got, wide.to(dtype))
