"""dct, idct, dht, haar and ihaar as users call them: gradients, norms, what torch must know of their ops, bad input."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.ops import _transforms as ops
from lora_kernels.testing import bitwise_equal, rms, transform_oracle

FUNCTIONS = ("dct", "idct", "dht", "haar", "ihaar")
CALLS = [
    *((name, {"type": type, "norm": norm}) for name in ("dct", "idct") for type in (2, 3) for norm in ("ortho", None)),
    ("dht", {"norm": "ortho"}),
    ("dht", {"norm": None}),
    *((name, {"levels": levels}) for name in ("haar", "ihaar") for levels in (1, 3)),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CALLS]
each_call = pytest.mark.parametrize(("name", "options"), CALLS, ids=IDS)


@each_call
def test_defaults(name, options):
    """scipy's: type 2; but "ortho"; one level."""
    x = torch.randn(3, 20)
    if options == {"type": 2, "norm": "ortho"} or options == {"norm": "ortho"} or options == {"levels": 1}:
        assert bitwise_equal(getattr(lk, name)(x), getattr(lk, name)(x, **options))
    else:
        assert not torch.allclose(getattr(lk, name)(x), getattr(lk, name)(x, **options))


@pytest.mark.parametrize("type", (2, 3))
@pytest.mark.parametrize("norm", ("ortho", None))
@pytest.mark.parametrize("name", ("dct", "idct"))
def test_scipy(name, type, norm):
    fft = pytest.importorskip("scipy.fft")
    for length in (1, 2, 5, 45, 96, 137, 3072):
        x = torch.randn(2, length)
        want = torch.from_numpy(getattr(fft, name)(x.double().numpy(), type=type, norm=norm))
        got = getattr(lk, name)(x, type=type, norm=norm).double()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * rms(want))


@pytest.mark.parametrize("length", (1, 2, 7, 64, 137, 5120, 11008))
def test_inverses(length, backend):
    x = torch.randn(3, length)
    for norm in ("ortho", None):
        for type in (2, 3):
            back = lk.idct(lk.dct(x, type=type, norm=norm), type=type, norm=norm)
            torch.testing.assert_close(back, x, rtol=0, atol=5e-6)
            back = lk.dct(lk.idct(x, type=type, norm=norm), type=type, norm=norm)
            torch.testing.assert_close(back, x, rtol=0, atol=5e-6)
        twice = lk.dht(lk.dht(x, norm=norm), norm=norm)
        torch.testing.assert_close(twice / (1 if norm else length), x, rtol=0, atol=5e-6)
    for levels in (1, 2, 40):
        torch.testing.assert_close(lk.ihaar(lk.haar(x, levels=levels), levels=levels), x, rtol=0, atol=5e-6)
    for y in (lk.dct(x), lk.idct(x, type=3), lk.dht(x), lk.haar(x, levels=2)):
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("name", ("dct", "idct", "dht"))
def test_fp32_error_is_that_of_a_few_roundings(name, backend):
    """Of a power of two, of lengths of models, and of a prime, which no fast algorithm takes as it is."""
    for length in (4096, 5120, 11008, 13696, 29568, 1069):
        x = torch.randn(2, length)
        exact = transform_oracle(name, x)
        assert torch.dist(getattr(lk, name)(x).double(), exact) < 6e-7 * exact.norm(), length


def test_levels_end_with_the_last_number():
    x = torch.randn(2, 12)
    whole = lk.haar(x, levels=4)
    for levels in (5, 40, 10**6):
        assert bitwise_equal(lk.haar(x, levels=levels), whole)
        assert bitwise_equal(lk.ihaar(whole, levels=levels), lk.ihaar(whole, levels=4))
    assert not torch.equal(lk.haar(x, levels=3), whole)
    one = torch.randn(3, 1)
    assert bitwise_equal(lk.haar(one, levels=2), one)


@each_call
@pytest.mark.parametrize("length", (1, 2, 5, 12, 15))
def test_gradients(name, options, length):
    x = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    call = lambda x: getattr(lk, name)(x, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@each_call
def test_adjoint(name, options, backend):
    """⟨Tx, y⟩ = ⟨x, Tᵀy⟩ by autograd, in the dtype the kernels take; and of the gradient's gradient."""
    for length in (2, 33, 64, 137, 3584, 4864):
        x, y = (torch.randn(2, length, requires_grad=True) for _ in range(2))
        Tx = getattr(lk, name)(x, **options)
        (Tty,) = torch.autograd.grad(Tx, x, y, create_graph=True)
        left, right = (Tx.double() * y).sum(), (x.double() * Tty).sum()
        noise = (Tx.norm() * y.norm() + x.norm() * Tty.norm()).item()
        assert abs(left - right) < 1e-6 * noise
        z = torch.randn_like(x)
        (Tz,) = torch.autograd.grad(Tty, y, z)
        assert bitwise_equal(Tz, getattr(lk, name)(z, **options))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_comes_in_xs_dtype_from_an_expanded_one(name):
    x = torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    getattr(lk, name)(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    want = transform_oracle(name, torch.ones(3, 96), adjoint=True)
    torch.testing.assert_close(x.grad.double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_graph_where_none_is_wanted(name):
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        assert not getattr(lk, name)(x).requires_grad
    with torch.inference_mode():
        getattr(lk, name)(x)


def op_calls(x):
    for form in ("cosine", "hartley", "fourier"):
        for transpose in (False, True):
            yield ops.trigonometric, (x, form, 0.5, 0.25, transpose)
    for transpose in (False, True):
        yield ops.haar, (x, 2, transpose)


XS = {
    "dense": lambda: torch.randn(3, 12),
    "no-rows": lambda: torch.randn(0, 12),
    "vector": lambda: torch.randn(7),
    "one-number": lambda: torch.randn(3, 1),  # which is what comes out, in memory of its own
    "strided": lambda: torch.randn(4, 3, 2, 10)[:, 1:, :, ::2].transpose(0, 1),
    "bf16": lambda: torch.randn(3, 12).bfloat16(),
}


@pytest.mark.parametrize("x", XS)
def test_opcheck(x):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in op_calls(XS[x]()):
        torch.library.opcheck(op.overload, arguments, test_utils=checks)


@pytest.mark.parametrize("transpose", (False, True))
def test_opcheck_traced(transpose):
    for op, rest in ((ops.trigonometric, ("cosine", 0.5, 0.25)), (ops.haar, (2,))):
        arguments = (torch.randn(3, 15), *rest, transpose)
        torch.library.opcheck(op.overload, arguments, test_utils="test_aot_dispatch_dynamic")


@each_call
def test_compiled_sees_any_number_of_rows(name, options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x: getattr(lk, name)(x * 2, **options), fullgraph=True, backend=counter)
    graphs = []
    for n in (4, 7, 9, 12, 5, 23):
        x = torch.randn(n, 45, requires_grad=True)
        y = function(x)
        torch.testing.assert_close(y, getattr(lk, name)(x * 2, **options))
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        want = 2 * transform_oracle(name, dy, adjoint=True, **options)
        torch.testing.assert_close(dx.double(), want, rtol=0, atol=1e-5 * rms(want))
        graphs.append(counter.frame_count)
    assert graphs[0] == 1
    assert len(set(graphs[1:])) == 1, f"compiled again: {graphs}"


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops():
    """Of a real fast Fourier transform, as they are counted for a power of two; of the Haar transform's levels."""
    x = torch.randn(3, 96)
    for call in (lk.dct, lk.idct, lk.dht):
        assert flops(lambda call=call: call(x)) == int(2.5 * 3 * 96 * math.log2(96))
    assert flops(lambda: lk.dct(torch.randn(5, 1))) == int(2.5 * 5)
    assert flops(lambda: lk.haar(x)) == 2 * 3 * 96
    assert flops(lambda: lk.ihaar(x, levels=5)) == 4 * 3 * 96


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forced_reference(name, monkeypatch):
    op, called = ops.haar if "haar" in name else ops.trigonometric, []
    original = op.reference
    monkeypatch.setattr(op, "reference", lambda *a: (called.append(1), original(*a))[1])
    x = torch.randn(2, 12, requires_grad=True)
    with lk.backend("reference"):
        y = getattr(lk, name)(x)
    y.sum().backward()  # by the backend that was forced then
    assert len(called) == 2


ERRORS = [
    (FUNCTIONS, [1.0, 2.0], {}, TypeError, "x must be a tensor"),
    (FUNCTIONS, torch.zeros(4, dtype=torch.int64), {}, TypeError, "x .*int64"),
    (FUNCTIONS, torch.zeros(4, dtype=torch.complex64), {}, TypeError, "x .*complex64"),
    (FUNCTIONS, torch.tensor(1.0), {}, ValueError, r"x must be \[..., N\], got a scalar"),
    (FUNCTIONS, torch.zeros(3, 0), {}, ValueError, r"x must have rows of at least one number, got .*3, 0"),
    (
        ("dct", "idct", "dht"),
        torch.zeros(4),
        {"norm": "forward"},
        ValueError,
        "norm must be 'ortho' or None, got 'forward'",
    ),
    (("dct", "idct"), torch.zeros(4), {"type": 1}, ValueError, "type must be 2 or 3, got 1"),
    (("dct", "idct"), torch.zeros(4), {"type": "2"}, ValueError, "type must be 2 or 3, got '2'"),
    (("haar", "ihaar"), torch.zeros(4), {"levels": 0}, ValueError, "levels must be an int of at least 1, got 0"),
    (("haar", "ihaar"), torch.zeros(4), {"levels": -2}, ValueError, "levels must be an int of at least 1, got -2"),
    (("haar", "ihaar"), torch.zeros(4), {"levels": 1.5}, ValueError, "levels must be an int of at least 1, got 1.5"),
    (("haar", "ihaar"), torch.zeros(4), {"levels": True}, ValueError, "levels must be an int of at least 1, got True"),
]


@pytest.mark.parametrize("names, x, options, error, words", ERRORS)
def test_bad_input(names, x, options, error, words):
    for name in names:
        with pytest.raises(error, match=words):
            getattr(lk, name)(x, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_and_meta_tensors(name):
    with FakeTensorMode():
        y = getattr(lk, name)(torch.randn(4, 2, 15).transpose(0, 1))
    assert y.shape == (2, 4, 15)
    assert y.is_contiguous()
    y = getattr(lk, name)(torch.empty(3, 15, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 15), torch.bfloat16, "meta")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_number_a_row_of_any_strides(name):
    assert getattr(lk, name)(torch.randn(3, 2, 1).permute(1, 0, 2)).is_contiguous()
