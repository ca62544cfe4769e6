"""`lora_linear` straight from Python: the whole layer on AMX tiles where they take it, torch's product where not."""

import pytest
import torch
from torch.nn.functional import linear

import lora_kernels as lk
from lora_kernels.ops import _dispatch
from lora_kernels.ops.low_rank import lora_add_
from lora_kernels.testing import assert_within_rule, bitwise_equal, threads

C = _dispatch.extension
pytestmark = pytest.mark.skipif(C is None, reason=f"needs the compiled extension: {_dispatch.extension_error}")
ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 48, 49, 64, 100, 256)
MOST_ROWS = max(ROWS)


def arguments(K, N, R=4, factors=torch.bfloat16, bias=True, M=MOST_ROWS):
    x, W, A, B = torch.randn(M, K), torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    b = torch.randn(N).bfloat16() if bias else None
    return x.bfloat16(), W.bfloat16(), b, (A.to(factors),), (B.to(factors),), 0.5


def separately(x, W, b, A, B, scale):
    """Torch's product, and the op."""
    y = linear(x, W, b)
    lora_add_.direct(y, x, A, B, None, None, None, None, None, None, scale)
    return y


@pytest.fixture
def products():
    """Takes down when torch's product is called."""
    calls, watchers = [], (torch._C._is_any_autocast_enabled,)
    C.connect_linear(lambda *args: (calls.append(args), linear(*args))[1], watchers)
    yield calls
    C.connect_linear(linear, watchers)


@pytest.mark.parametrize("factors", (torch.bfloat16, torch.float32), ids=("bf16", "masters"))
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize(("K", "N", "R"), ((32, 16, 1), (64, 48, 4), (1056, 272, 16), (96, 640, 40)))
def test_every_number_of_rows(isa, K, N, R, bias, factors):
    """Within the error rule; a row's bits do not depend on its batch where the product is made here."""
    x, W, b, A, B, scale = arguments(K, N, R, factors, bias)
    double = [None if t is None else t.double() for t in (x, W, b, A[0], B[0])]
    oracle = linear(*double[:3]) + scale * (double[0] @ double[3].T) @ double[4].T
    plain = linear(x, W, b) + (scale * (x.to(factors) @ A[0].T) @ B[0].T).bfloat16()
    whole = C.lora_linear(x, W, b, A, B, scale)
    assert_within_rule(whole, oracle, plain)
    for count in (1, 2):
        with threads(count):
            for m in ROWS:
                want = whole[:m] if isa == "amx" else separately(x[:m], W, b, A, B, scale)
                assert bitwise_equal(C.lora_linear(x[:m], W, b, A, B, scale), want), m


@pytest.mark.parametrize("isa", ("amx",), indirect=True)
def test_what_is_made_here(isa, products):
    args = arguments(576, 320)
    x, W, b, A, B, scale = args
    y = C.lora_linear(x.view(4, 64, 576), W, b, A, B, scale)
    assert y.shape == (4, 64, 320)
    assert bitwise_equal(y.view(MOST_ROWS, 320), C.lora_linear(*args))
    assert bitwise_equal(C.lora_linear(x[5], W, b, A, B, scale), C.lora_linear(*args)[5])
    assert not products
    wide = torch.randn(MOST_ROWS, 577).bfloat16()
    for other in (
        arguments(600, 320), arguments(576, 328), arguments(576, 320, M=MOST_ROWS + 1),
        (wide[:, :576], W, b, A, B, scale), (x, W.T.contiguous().T, b, A, B, scale),
        (x, W, torch.randn(640).bfloat16()[::2], A, B, scale), (x[:0], W, b, A, B, scale),
        (x.float(), W.float(), b.float(), (A[0].float(),), (B[0].float(),), scale),
    ):  # fmt: skip
        assert bitwise_equal(C.lora_linear(*other), separately(*other))
        assert len(products) == 1
        products.clear()


def test_not_a_number():
    x, W, b, A, B, scale = arguments(64, 48, M=20)
    for rows in (3, 20):
        spoilt = x[:rows].clone()
        spoilt[1, 5] = float("nan")
        y = C.lora_linear(spoilt, W, b, A, B, scale)
        assert y[1].isnan().all()
        assert y.isnan().sum() == 48
        weight = W.clone()
        weight[7, 3] = float("nan")
        assert C.lora_linear(x[:rows], weight, b, A, B, scale).isnan().sum() == rows


def test_refuses():
    x, W, b, A, B, scale = arguments(64, 48)
    for bad in (
        (x.double(), W, b, A, B, scale), (x, W, b, A[0], B, scale), (x, W, b, (A[0][:, 1:],), B, scale),
        (x, W, b, A, (B[0][1:],), scale), (x, W, b, (A[0].half(),), (B[0].half(),), scale), (None, W, b, A, B, scale),
    ):  # fmt: skip
        assert C.lora_linear(*bad) is None
    with torch.autocast("cpu"):
        assert C.lora_linear(x, W, b, A, B, scale) is None
    for bad in ((), (x,), (x, W, b, A, B, "1")):
        with pytest.raises(TypeError):
            C.lora_linear(*bad)
    for bad in ((), (linear,), (linear, [])):
        with pytest.raises(TypeError, match="connect_linear"):
            C.connect_linear(*bad)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        C.lora_linear(x[:, :32], W, b, A, B, scale)


@torch.no_grad()
def test_the_op_takes_it():
    x, W, _, A, B, scale = arguments(576, 320)
    want = C.lora_linear(x, W, None, A, B, scale)
    assert bitwise_equal(lk.lora_linear(x, W, A[0], B[0], scaling=scale), want)
    with lk.backend("cpu"):
        assert bitwise_equal(lk.lora_linear(x, W, A[0], B[0], scaling=scale), separately(x, W, None, A, B, scale))
