"""``spectral`` on a GPU: every sample forward and backward, its bits, a layer of real size, a captured graph."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import spectral as ops
from lora_kernels.testing import (
    SPECTRAL_DTYPES,
    SPECTRAL_KINDS,
    SPECTRAL_LEAVES,
    assert_within_rule,
    bitwise_equal,
    rms,
    spectral_delta_expected,
    spectral_expected,
    spectral_gradients,
    spectral_location_expected,
    spectral_samples,
    spectral_upstream,
)

FEWEST = 256  # of fewer results in half precision the RMS error is a matter of luck


def on_gpu(t):
    """A copy on the GPU with the same strides, a view of a copy of the same base."""
    base = t if t._base is None else t._base
    return base.cuda().as_strided(t.shape, t.stride(), t.storage_offset())


def arguments(sample):
    a = sample.make(0)
    moved = {n: on_gpu(a[n]) for n in SPECTRAL_LEAVES if a[n] is not None}
    return {**a, **moved, "plan": a["plan"].to("cuda")}


def judge(got, want, what):
    if got.dtype == torch.float32 or got.numel() >= FEWEST:
        assert_within_rule(got.cpu(), *want[:2], noise=want.noise, what=what)
    else:
        torch.testing.assert_close(got.cpu().double(), want.oracle.double(), rtol=2**-6, atol=2**-6 * rms(want.oracle))


@pytest.fixture(params=("activation", "weight", "chosen"))
def way(request, monkeypatch):
    """By transformed rows of x, by ΔW, or by the faster of them."""
    if request.param != "chosen":
        monkeypatch.setattr(ops, "spectral_route", lambda *args: request.param)
    return request.param


def test_kernels_are_what_runs():
    ran = {op.op: op.backend for op in lk.info().ops if op.device == "cuda" and op.family == "spectral"}
    assert set(ran.values()) <= {"triton", "cuda"}
    assert "spectral_linear" in ran


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_samples(name, kind, way):
    for sample in spectral_samples(*SPECTRAL_DTYPES[name]):
        if kind not in sample.traits:
            continue
        a, dy = arguments(sample), spectral_upstream(sample.make(0)).cuda()
        first = spectral_gradients(lk.spectral_linear, a, dy)
        again = spectral_gradients(lk.spectral_linear, arguments(sample), dy)
        for n, want in spectral_expected(sample).items():
            judge(first[n], want, f"{n} of {sample.name}")
            assert bitwise_equal(first[n], again[n]), f"{n} of {sample.name}"


@pytest.mark.parametrize("name", SPECTRAL_DTYPES)
def test_delta_weights_and_places(name):
    for sample in spectral_samples(*SPECTRAL_DTYPES[name]):
        a = arguments(sample)
        W = lk.spectral_delta_weight(a["values"], a["plan"], kind=a["kind"], scale=a["scale"])
        judge(W, spectral_delta_expected(sample), f"W of {sample.name}")
        if a["kind"] == "dct":
            dy = spectral_upstream(sample.make(0)).cuda()
            got = lk.spectral_location_grad(dy, a["x"], a["values"], a["plan"], scale=a["scale"])
            for d, (what, want) in zip(got, spectral_location_expected(sample).items(), strict=True):
                judge(d, want, f"{what} of {sample.name}")


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("M, N, K, n", ((1, 4096, 4096, 1000), (513, 3072, 3584, 2592), (2048, 1024, 1024, 31457)))
def test_layer(M, N, K, n, dtype, kind):
    plan = lk.SpectralPlan.random(n, (N, K)).to("cuda")
    scale = (N * K) ** 0.5 if kind == "fourier" else 1.0
    x, values = torch.randn(M, K, device="cuda").to(dtype), torch.randn(n, device="cuda")
    leaves = [t.requires_grad_() for t in (x, values)]
    y = lk.spectral_linear(*leaves, plan, kind=kind, scale=scale)
    dy = torch.randn_like(y)
    got = y, *torch.autograd.grad(y, leaves, dy)
    W = lk.spectral_delta_weight(values.detach().double(), plan, kind=kind, scale=scale)
    wide = [t.detach().double().requires_grad_() for t in (x, values)]
    exact = wide[0] @ W.T
    dW = dy.double().T @ wide[0].detach()
    dense = lk.spectral_delta_weight(wide[1], plan, kind=kind, scale=scale)
    wants = exact, *torch.autograd.grad(exact, wide[0], dy.double()), *torch.autograd.grad(dense, wide[1], dW)
    for g, w in zip(got, wants, strict=True):
        limit = 2**-8 if g.dtype == torch.bfloat16 else 2**-17  # half a rounding of the terms
        assert rms(g.detach().double() - w.detach()) <= limit * rms(w.detach())


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_a_graph_has_the_bits(kind):
    plan = lk.SpectralPlan.random(1000, (1024, 896)).to("cuda")
    x, y = torch.randn(33, 896, device="cuda").bfloat16(), torch.randn(33, 1024, device="cuda").bfloat16()
    values, dy = torch.randn(1000, device="cuda", requires_grad=True), torch.randn_like(y)
    x.requires_grad_()

    def step():
        out = lk.spectral_linear(x, values, plan, kind=kind, scale=3.0, y=y)
        return out, *torch.autograd.grad(out, (x, values), dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for t in (x, y, values, dy):
            t.copy_(torch.randn_like(t))
    graph.replay()
    for r, w in zip(results, step(), strict=True):
        assert bitwise_equal(r.detach(), w.detach())


@pytest.mark.parametrize("kind", SPECTRAL_KINDS)
def test_never_builds_the_weight(kind):
    """Forward and backward at once take less than a tenth of ΔW."""
    size = 4096
    plan = lk.SpectralPlan.random(1000, (size, size)).to("cuda")
    leaves = [t.requires_grad_() for t in (torch.randn(4, size, device="cuda"), torch.randn(1000, device="cuda"))]

    def step():
        lk.spectral_linear(*leaves, plan, kind=kind).sum().backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < size * size * 4 // 10


def test_random_plans_are_the_cpus():
    plan = lk.SpectralPlan.random(50, (24, 20))
    there = plan.to("cuda")
    assert there.device.type == "cuda"
    for kind in SPECTRAL_KINDS:
        for a, b in zip(plan.entries(kind), there.entries(kind), strict=True):
            assert torch.equal(a, b.cpu())
