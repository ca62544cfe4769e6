"""The ``transforms`` family on a GPU, against the float64 oracle; under graph capture; its gradient."""

import functools

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops._transforms import hadamard
from lora_kernels.testing import (
    TRANSFORM_DTYPES,
    assert_within_rule,
    bitwise_equal,
    wht_noise,
    wht_oracle,
    wht_plain,
    wht_samples,
)

SAMPLES = [
    pytest.param(sample, id=f"{name}-{sample.name}")
    for name, dtype in TRANSFORM_DTYPES.items()
    for sample in wht_samples(dtype)
]


def on_gpu(x):
    """A copy on the GPU with the same strides, a view of a copy of the same base."""
    base = x if x._base is None else x._base
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


@functools.cache
def expected(sample):
    a = sample.make(0)
    return wht_oracle(**a), wht_plain(**a), wht_noise(**a)


@pytest.fixture(params=("unforced", "cuda"))
def route(request):
    if request.param == "unforced":
        yield request.param
        return
    if hadamard.cuda is None:
        pytest.skip("needs the CUDA kernels: LORA_KERNELS_BUILD=cuda")
    with lk.backend("cuda"):
        yield request.param


@pytest.mark.parametrize("sample", SAMPLES)
def test_wht(sample, route):
    a = sample.make(0)
    x = on_gpu(a.pop("x"))
    if route == "cuda" and ("odd" in sample.traits or 4 * x.shape[-1] > shared_memory()):
        with pytest.raises(RuntimeError, match="the CUDA kernel takes no"):
            lk.wht(x, **a)
        return
    y = lk.wht(x, **a)
    oracle, plain, noise = expected(sample)
    assert_within_rule(y.cpu(), oracle, plain, noise=noise, what=sample.name)
    assert bitwise_equal(lk.wht(x, **a).cpu(), y.cpu())


def shared_memory():
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin


def test_many_rows(route):
    x = torch.randn(70_001, 96, device="cuda").bfloat16()
    torch.testing.assert_close(lk.wht(x), wht_plain(x.cpu()).cuda())


def test_gradient(route):
    x = torch.randn(5, 5120, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(lk.wht(x), x, dy)
    torch.testing.assert_close(dx.double().cpu(), wht_oracle(dy.cpu(), transpose=True), rtol=0, atol=1e-5)


def test_captured(route):
    x = torch.randn(8, 3072, device="cuda")
    lk.wht(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lk.wht(x)
    x.normal_()
    graph.replay()
    assert bitwise_equal(y.cpu(), lk.wht(x).cpu())
