"""The ``transforms`` family on a GPU, against the float64 oracle; under graph capture; its gradients."""

import functools

import pytest
import torch
from judging import judge

import lora_kernels as lk
from lora_kernels.ops._dispatch import has_triton
from lora_kernels.ops._transforms import hadamard
from lora_kernels.testing import (
    TRANSFORM_DTYPES,
    TRANSFORM_FUNCTIONS,
    bitwise_equal,
    transform_noise,
    transform_oracle,
    transform_plain,
    transform_samples,
)

each_function = pytest.mark.parametrize("function", TRANSFORM_FUNCTIONS)


def on_gpu(x):
    """A copy on the GPU with the same strides, a view of a copy of the same base."""
    base = x if x._base is None else x._base
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


@functools.cache
def expected(function, sample):
    a = sample.make(0)
    return [make(function, **a) for make in (transform_oracle, transform_plain, transform_noise)]


@pytest.fixture(params=("unforced", "cuda", "triton"))
def route(request):
    """Of a function, the ways it can take: ``wht`` has CUDA kernels besides Triton's."""
    if request.param == "unforced":
        yield request.param
        return
    if request.param == "cuda" and hadamard.cuda is None:
        pytest.skip("needs the CUDA kernels: LORA_KERNELS_BUILD=cuda")
    if request.param == "cuda" and request.node.callspec.params.get("function", "wht") != "wht":
        pytest.skip("has no CUDA kernel")
    if request.param == "triton" and not has_triton("transforms"):
        pytest.skip("needs Triton")
    with lk.backend(request.param):
        yield request.param


def test_kernels_are_what_runs():
    ran = {op.op: op.backend for op in lk.info().ops if op.device == "cuda" and op.family == "transforms"}
    assert ran.keys() == {"hadamard", "trigonometric", "haar"}
    assert set(ran.values()) <= {"triton", "cuda"}


@each_function
@pytest.mark.parametrize("dtype", TRANSFORM_DTYPES)
def test_within_the_rule(function, dtype, route):
    call = getattr(lk, function)
    for sample in transform_samples(function, TRANSFORM_DTYPES[dtype]):
        a = sample.make(0)
        x = on_gpu(a.pop("x"))
        if route == "cuda" and ("odd" in sample.traits or 4 * x.shape[-1] > shared_memory()):
            with pytest.raises(RuntimeError, match="the CUDA kernel takes no"):
                call(x, **a)
            continue
        y = call(x, **a)
        judge(y.cpu(), *expected(function, sample), sample.name)
        assert bitwise_equal(call(x, **a).cpu(), y.cpu()), sample.name


def shared_memory():
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin


@each_function
def test_many_rows(function, route):
    x = torch.randn(70_001, 96, device="cuda").bfloat16()
    torch.testing.assert_close(getattr(lk, function)(x), transform_plain(function, x.cpu()).cuda())


@each_function
def test_gradient(function, route):
    x = torch.randn(5, 5120, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(getattr(lk, function)(x), x, dy)
    torch.testing.assert_close(dx.double().cpu(), transform_oracle(function, dy.cpu(), adjoint=True), rtol=0, atol=1e-5)


@each_function
def test_a_row_that_is_not_finite_stays_alone(function, route):
    x = torch.randn(37, 3072, device="cuda")
    want = getattr(lk, function)(x)
    x[3, 100], x[36, 0] = torch.nan, torch.inf
    y = getattr(lk, function)(x)
    others = [i for i in range(37) if i not in (3, 36)]
    assert bitwise_equal(y[others].cpu(), want[others].cpu())
    assert not y[[3, 36]].isfinite().all(-1).any()


@each_function
def test_captured(function, route):
    x, call = torch.randn(8, 3072, device="cuda"), getattr(lk, function)
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    x.normal_()
    graph.replay()
    assert bitwise_equal(y.cpu(), call(x).cpu())
