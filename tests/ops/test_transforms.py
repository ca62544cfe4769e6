"""wht as users call it: gradients, what torch must know of its op, bad input."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.ops import _transforms as ops
from lora_kernels.reference import hadamard
from lora_kernels.reference.hadamard import base, orders_of, signs_of
from lora_kernels.testing import bitwise_equal, wht_oracle, wht_samples

SMALL = [pytest.param(s, id=s.name) for s in wht_samples(torch.float32) if s.make(0)["x"].numel() < 2000]


def op_arguments(x, norm, transpose, layout):
    orders = orders_of(x.shape[-1], layout)
    return x, signs_of(orders, x.device), orders, 0.5 if norm is None else x.shape[-1] ** -0.5, transpose


def test_fp32_error_is_that_of_a_few_roundings(backend):
    for length in (4096, 5120, 11008, 14336):
        x = torch.randn(4, length)
        exact = wht_oracle(x)
        assert torch.dist(lk.wht(x).double(), exact) < 4e-7 * exact.norm()


@pytest.mark.parametrize("length", (64, 40, 344))
def test_norms_and_inverses(length):
    x = torch.randn(3, length, dtype=torch.float64)
    y = lk.wht(x)
    torch.testing.assert_close(y.norm(), x.norm())
    torch.testing.assert_close(lk.wht(y, transpose=True), x)
    torch.testing.assert_close(lk.wht(x, norm=None), y * length**0.5)


def test_it_is_the_kronecker_product():
    x = torch.randn(7, 336, dtype=torch.float64)
    H = torch.kron(base(12), base(28)).double()
    torch.testing.assert_close(lk.wht(x, norm=None), x @ H.T)
    torch.testing.assert_close(lk.wht(x, norm=None, transpose=True), x @ H)


@pytest.mark.parametrize("length", (64, 144, 5120, 14336))
def test_a_length_has_quarots_matrix_where_there_is_one(length):
    x = torch.randn(3, length)
    assert bitwise_equal(lk.wht(x), lk.wht(x, layout="quarot"))


@pytest.mark.parametrize("length", (16, 12, 24, 40, 104, 240))
@pytest.mark.parametrize("transpose", (False, True))
def test_gradients(length, transpose):
    x = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lk.wht(x, transpose=transpose), x)
    assert torch.autograd.gradgradcheck(lambda x: lk.wht(x, transpose=transpose), x)


@pytest.mark.parametrize(
    "length, layout",
    [(length, "auto") for length in (12, 20, 28, 44, 52, 3072, 5120, 11008)]
    + [(length, "quarot") for length in (12, 20, 28, 52, 3072, 5120, 11008)],  # QuaRot has no 44
)
def test_adjoint(length, layout):
    """⟨Hx, y⟩ = ⟨x, Hᵀy⟩ by transpose=True and by autograd, of bases that are not symmetric."""
    x, y = (torch.randn(2, length, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    Hx = lk.wht(x, layout=layout)
    Ht_y = lk.wht(y, layout=layout, transpose=True)
    torch.testing.assert_close((Hx * y).sum(), (x * Ht_y).sum())
    (dx,) = torch.autograd.grad(Hx, x, y)
    torch.testing.assert_close(dx, Ht_y)


def test_gradient_comes_in_xs_dtype_from_an_expanded_one():
    x = torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    lk.wht(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    want = lk.wht(torch.ones(3, 96, dtype=torch.bfloat16), transpose=True)
    assert bitwise_equal(x.grad, want)


def test_no_graph_where_none_is_wanted():
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        assert not lk.wht(x).requires_grad
    with torch.inference_mode():
        lk.wht(x)


@pytest.mark.parametrize("sample", SMALL)
def test_opcheck(sample):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.hadamard.overload, op_arguments(**sample.make(0)), test_utils=checks)


@pytest.mark.parametrize("length", (64, 40))
def test_opcheck_traced(length):
    arguments = op_arguments(torch.randn(3, length), "ortho", True, "auto")
    torch.library.opcheck(ops.hadamard.overload, arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("length", (64, 160))
def test_compiled_sees_any_number_of_rows(length):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x: lk.wht(x * 2), fullgraph=True, backend=counter)
    graphs = []
    for n in (4, 7, 9, 12, 5, 23):
        x = torch.randn(n, length, requires_grad=True)
        y = function(x)
        torch.testing.assert_close(y, lk.wht(x * 2))
        (dx,) = torch.autograd.grad(y, x, y.detach())
        torch.testing.assert_close(dx, x.detach() * 4)
        graphs.append(counter.frame_count)
    assert graphs[0] == 1
    assert len(set(graphs[1:])) == 1, f"compiled again: {graphs}"


def test_flops():
    with FlopCounterMode(display=False) as counter:
        lk.wht(torch.randn(3, 96))
    assert counter.get_total_flops() == 3 * 96 * (12 - 1 + 3 + 1)


def test_forced_reference(monkeypatch):
    called = []
    original = ops.hadamard.reference
    monkeypatch.setattr(ops.hadamard, "reference", lambda *a: (called.append(1), original(*a))[1])
    x = torch.randn(2, 12, requires_grad=True)
    with lk.backend("reference"):
        y = lk.wht(x)
    y.sum().backward()  # by the backend that was forced then
    assert len(called) == 2


def test_what_the_cuda_kernel_refuses():
    def refusal(x, layout="auto"):
        return ops.hadamard.cuda_refuses(*op_arguments(x, "ortho", False, layout))

    assert refusal(torch.empty(2, 4096)) is None
    assert refusal(torch.empty(2, 53248)) is None
    assert "float64" in refusal(torch.empty(2, 64, dtype=torch.float64))
    assert "12" in refusal(torch.empty(2, 12))
    assert "40" in refusal(torch.empty(2, 40), "quarot")
    assert "65536" in refusal(torch.empty(2, 65536))


@pytest.mark.parametrize(
    "x, options, error, words",
    [
        ([1.0, 2.0], {}, TypeError, "x must be a tensor"),
        (torch.zeros(4, dtype=torch.int64), {}, TypeError, "int64"),
        (torch.zeros(4, dtype=torch.complex64), {}, TypeError, "complex64"),
        (torch.tensor(1.0), {}, ValueError, "scalar"),
        (torch.zeros(3, 0), {}, ValueError, "order 0 "),
        (torch.zeros(2, 7), {}, ValueError, "order 7 "),
        (torch.zeros(2, 260), {}, ValueError, "order 260 "),
        (torch.zeros(2, 76), {"layout": "quarot"}, ValueError, "order 76"),
        (torch.zeros(4), {"norm": "forward"}, ValueError, "norm must be 'ortho' or None, got 'forward'"),
        (torch.zeros(4), {"layout": "dao"}, ValueError, "layout must be 'auto' or 'quarot', got 'dao'"),
    ],
)
def test_bad_input(x, options, error, words):
    with pytest.raises(error, match=words):
        lk.wht(x, **options)


def in_inference_mode():
    with torch.inference_mode():
        lk.wht(torch.randn(2, 24))


def exported():
    class Module(torch.nn.Module):
        def forward(self, x):
            return lk.wht(x)

    torch.export.export(Module(), (torch.randn(2, 24),), strict=False)


def with_fake_tensors():
    with FakeTensorMode():
        assert lk.wht(torch.randn(2, 24)).shape == (2, 24)


def traced():
    make_fx(lambda x: lk.wht(x), tracing_mode="fake")(torch.randn(2, 24))


def with_another_default_device():
    with torch.device("meta"):
        lk.wht(torch.randn(2, 24))


FIRST_CALLS = (in_inference_mode, exported, with_fake_tensors, traced, with_another_default_device)


@pytest.mark.parametrize("first", FIRST_CALLS, ids=lambda first: first.__name__)
def test_what_the_first_call_of_a_length_was_in_does_not_matter(first):
    for kept in (hadamard.base, hadamard._packed, hadamard._packed_on):
        kept.cache_clear()
    first()
    x = torch.randn(2, 24, requires_grad=True)
    (dx,) = torch.autograd.grad(lk.wht(x), x, torch.ones(2, 24))
    torch.testing.assert_close(dx, lk.wht(torch.ones(2, 24), transpose=True))


def test_one_number_a_row_of_any_strides():
    y = lk.wht(torch.randn(3, 2, 1).permute(1, 0, 2))
    assert y.is_contiguous()
