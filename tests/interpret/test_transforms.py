"""The ``transforms`` kernels in the checking interpreter, against the reference in float64."""

import dataclasses
import functools

import pytest
import torch
from layouts import strided
from lora_kernels.kernels.triton import _device, transforms

import lora_kernels as lk
from lora_kernels import select
from lora_kernels.ops import _transforms as ops
from lora_kernels.reference import transforms as reference
from lora_kernels.reference.hadamard import orders_of, signs_of
from lora_kernels.testing import TRANSFORM_DTYPES, assert_within_rule, bitwise_equal, rms

FORMS = ("cosine", "hartley", "fourier")
AMD = select.Gpu()


@pytest.fixture(autouse=True)
def triton_backend():
    with lk.backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names, launch = [], transforms.launch

    def noting(kernel, *rest, **named):
        names.append(kernel.fn.__name__)
        return launch(kernel, *rest, **named)

    monkeypatch.setattr(transforms, "launch", noting)
    return names


def rows(M, N, name="fp32", seed=0):
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed)).to(TRANSFORM_DTYPES[name])


def check(op, x, *args, gain=1.0):
    """An op against its reference in float64; plain PyTorch is the reference in fp32, rounded once.

    ``gain``: the norm of a row of the transform.
    """
    want = getattr(reference, op)(x.double(), *args)
    got = getattr(ops, op)(x, *args)
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    assert got.is_contiguous()
    noise = x.shape[-1] ** 0.5 * 2**-24 * gain * rms(x) if x.dtype == torch.float32 else 0.0
    assert_within_rule(got, want, getattr(reference, op)(x.float(), *args).to(x.dtype), noise=noise)
    return got


def check_hadamard(x, transpose=False, layout="auto", scale=None, orders=None):
    N = x.shape[-1]
    orders = orders_of(N, layout) if orders is None else orders
    scale = N**-0.5 if scale is None else scale
    return check("hadamard", x, signs_of(orders, x.device), list(orders), scale, transpose, gain=scale * N**0.5)


def check_trigonometric(x, form, transpose, first=None, rest=None):
    N = x.shape[-1]
    first, rest = (N**-0.5, (2 / N) ** 0.5) if first is None else (first, rest)
    return check("trigonometric", x, form, first, rest, transpose, gain=max(abs(first), abs(rest)) * N**0.5)


# A dense matrix alone, of no number, of one base and of two; with Sylvester's from the right; of several blocks.
LENGTHS = (
    (3, 1), (5, 2), (20, 8), (7, 12), (3, 48), (5, 56), (17, 96), (9, 128), (1, 352), (2, 400), (3, 1024), (1, 2752),
    (2, 4096),
)  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORM_DTYPES)
@pytest.mark.parametrize("M, N", LENGTHS)
def test_hadamard(name, M, N, launched):
    check_hadamard(rows(M, N, name), transpose=N % 3 != 0)
    assert launched == ["hadamard_kernel"]


@pytest.mark.parametrize("N, layout", ((48, "auto"), (352, "auto"), (640, "quarot")))
def test_hadamard_transposed(N, layout):
    """Of matrices that are not symmetric: the transpose is another one, and the inverse."""
    x = rows(3, N)
    y, other = check_hadamard(x, False, layout), check_hadamard(x, True, layout)
    assert not torch.allclose(y, other)
    torch.testing.assert_close(check_hadamard(y, True, layout), x)


@pytest.mark.parametrize("name", ("fp32", "bf16"))
@pytest.mark.parametrize("N, stages", ((12 * 28 * 4, 2), (20 * 44 * 16, 2), (12 * 28 * 44, 2), (1 << 17, 2)))
def test_hadamard_in_stages(N, stages, name, launched):
    """A matrix with large factors: each kernel has some of them."""
    check_hadamard(rows(1 + (N < 10000), N, name), transpose=N % 3 != 0)
    assert launched == ["hadamard_kernel"] * stages


def test_hadamard_scale():
    check_hadamard(rows(4, 80), scale=1.0)
    check_hadamard(rows(4, 256, "bf16"), scale=-0.3)


# A dense matrix alone: odd, even, of one number; two factors, padded ones among them, an even and an odd first factor,
# several blocks of frequencies.
POINTS = ((3, 1), (5, 2), (4, 3), (2, 8), (5, 15), (70, 12), (2, 137), (3, 352), (2, 315), (2, 1000), (5, 1024))


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M, N", POINTS)
def test_trigonometric(M, N, form, transpose, launched):
    check_trigonometric(rows(M, N), form, transpose)
    assert launched == ["trigonometric_transpose_kernel" if transpose else "trigonometric_kernel"]


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ("bf16", "fp16"))
@pytest.mark.parametrize("M, N", ((9, 56), (3, 352), (2, 2048)))
def test_trigonometric_of_16_bits(M, N, name, form, transpose):
    check_trigonometric(rows(M, N, name), form, transpose)


@pytest.mark.parametrize("N", (96, 352))
def test_trigonometric_scales(N):
    x = rows(3, N)
    for form in FORMS:
        for transpose in (False, True):
            check_trigonometric(x, form, transpose, 0.5 / N, 3.0 / N)


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("N", (3072, 4096))
def test_cosine_of_a_model(N, transpose):
    check_trigonometric(rows(1, N, "bf16"), "cosine", transpose)


@pytest.mark.parametrize("transpose", (False, True))
def test_cosines_that_are_gathered(transpose, monkeypatch):
    """A long prime, and a length with a large one, for which a shorter one stands."""
    choose = select.trigonometric_tiles
    assert choose(1031, torch.float32, transpose, AMD).gather
    assert choose(16 * 1031, torch.float32, transpose, AMD).N2 == 16
    check_trigonometric(rows(1, 1031), "cosine", transpose)
    monkeypatch.setattr(transforms, "trigonometric_tiles", lambda *a: dataclasses.replace(choose(*a), gather=True))
    check_trigonometric(rows(2, 352), "cosine", transpose)


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("M, N, levels", ((3, 1, 1), (5, 2, 1), (4, 3, 2), (2, 8, 3), (7, 15, 4), (70, 12, 2),
    (2, 137, 1), (3, 1000, 10), (2, 1024, 1), (1, 2500, 7)))  # fmt: skip
def test_haar(M, N, levels, transpose, launched):
    for name in TRANSFORM_DTYPES:
        launched.clear()
        check("haar", rows(M, N, name), levels, transpose)
        assert launched == ["haar_transpose_kernel" if transpose else "haar_kernel"]


@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("N", (4096, 8191))
def test_haar_of_many_levels(N, transpose, launched):
    for name in ("fp32", "bf16"):
        check("haar", rows(2, N, name), (N - 1).bit_length(), transpose)
    assert len(launched) == 4


CALLS = {
    "hadamard": functools.partial(check_hadamard),
    "cosine": lambda x: check_trigonometric(x, "cosine", False),
    "cosine transposed": lambda x: check_trigonometric(x, "cosine", True),
    "haar": lambda x: check("haar", x, 2, False),
    "haar transposed": lambda x: check("haar", x, 2, True),
}


@pytest.mark.parametrize("call", CALLS)
def test_any_strides(call):
    """The same bits as of rows side by side; a vector is a row."""
    x = rows(6, 352, "bf16").view(2, 3, 352)
    y = CALLS[call](x)
    for same in (strided(x), x.transpose(0, 2).contiguous().transpose(0, 2), torch.cat([x, x], -1)[..., :352]):
        assert bitwise_equal(CALLS[call](same), y)
    assert bitwise_equal(CALLS[call](x[0, 0].expand(3, 352)), y[0, :1].repeat(3, 1))
    assert bitwise_equal(CALLS[call](x[1, 2]), y[1, 2])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", ((0, 48), (3, 0, 352)))
def test_no_rows(call, shape):
    y = CALLS[call](torch.empty(shape))
    assert y.shape == shape


def test_rows_of_no_numbers():
    for form in FORMS:
        assert ops.trigonometric(torch.empty(3, 0), form, 1.0, 1.0, False).shape == (3, 0)
    assert ops.haar(torch.empty(3, 0), 1, False).shape == (3, 0)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_a_number_stays_in_its_row(call):
    x = rows(5, 352)
    x[2, 7] = float("nan")
    y = getattr(ops, "hadamard" if call == "hadamard" else "haar" if "haar" in call else "trigonometric")(
        x,
        *{
            "hadamard": (signs_of(orders_of(352, "auto"), x.device), [44], 1.0, False),
            "cosine": ("cosine", 1.0, 1.0, False),
            "cosine transposed": ("cosine", 1.0, 1.0, True),
            "haar": (2, False),
            "haar transposed": (2, True),
        }[call],
    )
    assert y[2].isnan().any()
    assert not y[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("transpose", (False, True))
def test_tiles_of_amd(transpose, monkeypatch):
    monkeypatch.setattr(_device, "gpu", lambda device: AMD)
    for name in ("fp32", "bf16"):
        check_trigonometric(rows(2, 1024, name), "cosine", transpose)
        check_hadamard(rows(2, 1024, name), transpose)


def test_public_functions_and_gradients(launched):
    x = rows(3, 48).requires_grad_()
    for function, inverse in ((lk.wht, functools.partial(lk.wht, transpose=True)), (lk.dct, lk.idct), (lk.dht, lk.dht),
                              (lk.haar, lk.ihaar)):  # fmt: skip
        dy = rows(3, 48, seed=1)
        y = function(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx, inverse(dy))
        torch.testing.assert_close(inverse(y).detach(), x.detach())
    assert {*launched} == {
        "hadamard_kernel", "trigonometric_kernel", "trigonometric_transpose_kernel", "haar_kernel",
        "haar_transpose_kernel",
    }  # fmt: skip
