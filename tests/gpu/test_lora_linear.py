"""``lora_linear`` on a GPU: its ops against the reference in fp64, its masks, graphs that draw seeds, its launches."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lora_kernels as lk
from lora_kernels.ops import _lora_linear as ops
from lora_kernels.reference.dropout import dropout_mask, keep_scale
from lora_kernels.testing import LOW_RANK_DTYPES, assert_within_rule, bitwise_equal, rms

DTYPES = ("fp32", "bf16", "fp16", "bf16-masters", "fp16-masters")
SIZES = ((1, 1, 1, 1), (37, 130, 70, 3), (300, 600, 264, 20), (700, 1032, 520, 64), (2100, 520, 1096, 150))
SCALE = 0.7


def randn(*size, dtype=torch.float32):
    return torch.randn(size, device="cuda").to(dtype)


def seed(value=-0x123456789ABCDEF):
    return torch.tensor([value], device="cuda")


def factors(dtypes, K, N, R):
    return randn(R, K, dtype=dtypes.factors) / K**0.5, randn(N, R, dtype=dtypes.factors)


def check(op, args, changed=None):
    """An op against its reference in fp64 and in the same dtypes, all on the GPU, and against itself."""
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    again, plain = (args[0].clone(), *args[1:]), (args[0].clone(), *args[1:])
    got, twice, want, yardstick = op(*args), op(*again), op.reference(*exact), op.reference(*plain)
    runs = [list((r,) if isinstance(r, torch.Tensor) else r) for r in (got, twice, want, yardstick)]
    if changed:
        for run, first in zip(runs, (args[0], again[0], exact[0], plain[0]), strict=True):
            run.append(first)
    half = args[0].dtype != torch.float32
    for i, (g, t, w, p) in enumerate(zip(*runs, strict=True)):
        assert bitwise_equal(g, t), i
        noise = (2**-16 if half else 2**-19) * rms(w)
        assert_within_rule(g.cpu(), w.cpu(), p.cpu(), noise=noise, what=changed if i and changed else f"result {i}")


def test_kernels_are_what_runs():
    ran = {op.op: op.backend for op in lk.info().ops if op.device == "cuda" and op.family == "lora_linear"}
    assert set(ran.values()) == {"triton"}


@pytest.mark.parametrize("columns", (False, True))
@pytest.mark.parametrize("p", (None, 0.05, 0.5))
@pytest.mark.parametrize("M, K, N, R", SIZES)
@pytest.mark.parametrize("name", DTYPES)
def test_ops(name, M, K, N, R, p, columns):
    dtypes = LOW_RANK_DTYPES[name]
    x, y, other, dy, dx = (randn(M, n, dtype=dtypes.x) for n in (K, N, N, N, K))
    (A, B), v, dv = factors(dtypes, K, N, R), randn(M, R), randn(M, R)
    c, e, bias = randn(N), randn(N), randn(N, dtype=dtypes.x)
    mask = None if p is None else seed(), p or 0.0
    check(ops.lora_forward_, (y, x, A, B, *((c, other, e, bias) if columns else [None] * 4), *mask, SCALE), "y")
    for need in ((True, True), (True, False), (False, True)):
        check(ops.lora_out_grads, (dy, v, B, *((y, bias, c) if columns else [None] * 3), SCALE, *need))
    check(ops.lora_in_grads_, (dx, dv, x, A, *mask, SCALE), "dx")
    W = randn(N, K, dtype=dtypes.x)
    check(ops.lora_weight_norm, (W, A, B, W.float().square().sum(1), SCALE))


@pytest.mark.parametrize("M, K", ((3, 21), (50, 130), (300, 40), (1000, 512)))
@pytest.mark.parametrize("p", (2**-16, 0.05, 0.5))
def test_every_kernel_has_the_mask(M, K, p):
    want = dropout_mask(seed(), M, K, p).float()
    assert torch.equal(want.cpu(), dropout_mask(seed().cpu(), M, K, p).float())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(M, K, device="cuda", dtype=dtype)
        assert torch.equal(ops.lora_dropout(x, seed(), p), want.to(dtype))
        y, rest = torch.zeros(M, 3, device="cuda", dtype=dtype), (None, None, None, None, seed(), p, 1.0)
        v = ops.lora_forward_(y, x, torch.eye(K, device="cuda", dtype=dtype), y.new_zeros(3, K), *rest)
        assert torch.equal(v, want)
        dx, ones = torch.zeros_like(x), torch.ones(M, 1, device="cuda")
        ops.lora_in_grads_(dx, ones, x, torch.ones(1, K, device="cuda", dtype=dtype), seed(), p, 1.0)
        assert torch.equal(dx, want.to(dtype))
        dA = ops.lora_in_grads_(x.new_empty(0), torch.eye(M, device="cuda"), x, x, seed(), p, 1.0) if M <= 512 else want
        assert torch.equal(dA, want)


def layer(M=2048, K=1024, N=512, R=16, dtype=torch.bfloat16, masters=True):
    factor = torch.float32 if masters else dtype
    x, W = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype) / K**0.5
    A, B = (randn(R, K) / K**0.5).to(factor), randn(N, R).to(factor)
    return x.requires_grad_(), W, A.requires_grad_(), B.requires_grad_()


def oracle(x, W, A, B, p, seed, *rest):
    """The layer and what its gradients are of, in fp64; of a DoRA with its magnitude, and a bias if it has one."""
    W = W.double()
    x, A, B, *rest = leaves = [t.detach().double().requires_grad_() for t in (x, A, B, *rest)]
    dropped = x * dropout_mask(seed, *x.shape, p) * keep_scale(p)
    delta = SCALE * (dropped @ A.T) @ B.T
    if not rest:
        return x @ W.T + delta, leaves
    magnitude, *bias = rest
    c = magnitude / (W + SCALE * B @ A).norm(dim=1).detach()
    return sum(bias, x @ W.T + (c - 1) * (dropped @ W.T) + c * delta), leaves


def assert_close(got, want, dtype):
    """Each result to half its dtype's rounding of the terms."""
    limit = 2**-8 if dtype == torch.bfloat16 else 2**-18
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        g, w = g.detach().double(), w.detach()
        assert rms(g - w) <= limit * rms(w), i


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("R", (16, 64))
def test_layer(dtype, R):
    x, W, A, B = layer(R=R, dtype=dtype)
    y = lk.lora_linear(x, W, A, B, scaling=SCALE, dropout=0.25, training=True, seed=seed())
    want, leaves = oracle(x, W, A, B, 0.25, seed())
    dy = torch.randn_like(y)
    got = y, *torch.autograd.grad(y, (x, A, B), dy)
    assert_close(got, (want, *torch.autograd.grad(want, leaves, dy.double())), dtype)


def magnitude_of(W):
    return (W.float().norm(dim=1) * (2 + randn(len(W)).abs())).requires_grad_()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("p", (0.0, 0.25))
@pytest.mark.parametrize("bias", (False, True))
def test_dora(dtype, p, bias):
    x, W, A, B = layer(dtype=dtype)
    rest = [magnitude_of(W), *([randn(len(W), dtype=dtype).requires_grad_()] if bias else [])]
    given = {"magnitude": rest[0], "weight_norm_sq": W.float().square().sum(1)}
    given = {**given, "bias": rest[1]} if bias else given
    y = lk.lora_linear(x, W, A, B, scaling=SCALE, dropout=p, training=True, seed=seed(), **given)
    want, leaves = oracle(x, W, A, B, p, seed(), *rest)
    dy = torch.randn_like(y)
    got = y, *torch.autograd.grad(y, (x, A, B, *rest), dy)
    assert_close(got, (want, *torch.autograd.grad(want, leaves, dy.double())), dtype)
    del given["weight_norm_sq"]
    again = lk.lora_linear(x, W, A, B, scaling=SCALE, dropout=p, training=True, seed=seed(), **given)
    assert_close([again], [y.double()], dtype)


def test_a_magnitude_of_zero_has_no_gradient():
    x, W, A, B = layer()
    magnitude = magnitude_of(W)
    with torch.no_grad():
        magnitude[3] = 0
    y = lk.lora_linear(x, W, A, B, magnitude=magnitude)
    (dm,) = torch.autograd.grad(y, magnitude, torch.randn_like(y))
    assert dm.isfinite().all()
    assert dm[3] == 0
    assert (dm != 0).sum() == len(dm) - 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_core_and_scales(dtype):
    x, W, A, B = layer(dtype=dtype)
    (N, K), core = W.shape, randn(len(A), len(A)) / 4
    i, d, e, o = (1 + randn(n) / 4 for n in (K, K, N, N))
    scales = {"in_scale": i, "delta_in_scale": d, "delta_scale": e, "out_scale": o}
    y = lk.lora_linear(x, W, A, B, scaling=SCALE, core=core, dropout=0.25, training=True, seed=seed(), **scales)
    wide, W, A, B = (t.detach().double() for t in (x, W, A, B))
    dropped = wide * d * dropout_mask(seed(), *x.shape, 0.25) * keep_scale(0.25)
    want = o * ((wide * i) @ W.T) + e * (SCALE * (dropped @ A.T @ core.double()) @ B.T)
    assert_close([y], [want], dtype)


def test_a_graph_draws_new_masks():
    """The seed is drawn inside: each replay has another mask, and its gradients have the forward's."""
    x, W, A, B = layer(M=64, K=256, N=256, R=256, dtype=torch.float32)
    with torch.no_grad():
        W.zero_()
        A.copy_(torch.eye(256))
        B.copy_(torch.eye(256))  # y is x under its mask, and so is dx of ones
        x.fill_(1)

    def step():
        y = lk.lora_linear(x, W, A, B, dropout=0.5, training=True)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    seen = []
    for _ in range(4):
        graph.replay()
        mask = y.clone()
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert 0.45 < (mask == 0).float().mean() < 0.55
        assert torch.equal(dx, mask)
        assert not any(torch.equal(mask, before) for before in seen)
        seen.append(mask)


def kernels_of(step):
    """The names of the kernels that ``step`` launches, once it has been called."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return [e.name for e in seen.events() if e.device_type.name == "CUDA" and not e.name.startswith("Mem")]


OURS = ("shrink_kernel", "expand_kernel", "expand_grad_kernel", "outer_kernel", "in_grad_kernel", "add_up_kernel")


def base_products(x, W):
    return len(kernels_of(lambda: torch.nn.functional.linear(x, W))), len(
        kernels_of(lambda: torch.matmul(x.new_empty(x.shape[0], W.shape[0]), W))
    )


@pytest.mark.parametrize("p", (0.0, 0.1))
@pytest.mark.parametrize("R, backward", ((16, 4), (64, 5)))
def test_launches(R, backward, p):
    """Beside the base layer's products: up to three forward, drawing a seed among them, and up to five backward."""
    x, W, A, B = layer(R=R)
    with torch.no_grad():
        base, of_gradient = base_products(x.detach(), W)
    run = lambda: lk.lora_linear(x, W, A, B, scaling=SCALE, dropout=p, training=True)  # noqa: E731
    forward = kernels_of(run)
    assert len(forward) - base <= 3, forward
    y = run()
    dy = torch.randn_like(y)
    there = kernels_of(lambda: torch.autograd.grad(y, (x, A, B), dy, retain_graph=True))
    assert len(there) - of_gradient <= backward, there
    assert all(any(name in kernel for kernel in there) for name in ("in_grad_kernel", "add_up_kernel")), there


@pytest.mark.parametrize("R, backward", ((16, 4), (64, 5)))
@pytest.mark.parametrize("p", (None, 0.1))
def test_launches_of_the_ops(R, backward, p):
    """With factors in 16 bits too, whose gradients the layer casts."""
    M, K, N = 2048, 1024, 512
    x, y, dy, dx = (randn(M, n, dtype=torch.bfloat16) for n in (K, N, N, K))
    A, B = factors(LOW_RANK_DTYPES["bf16"], K, N, R)
    mask, v = (None if p is None else seed(), p or 0.0), randn(M, R)
    none = (None,) * 4
    forward = kernels_of(lambda: ops.lora_forward_(y, x, A, B, *none, *mask, SCALE))
    assert [name for kernel in forward for name in OURS if name in kernel] == ["shrink_kernel", "expand_kernel"]
    assert len(forward) == 2

    def gradients():
        dv = ops.lora_out_grads(dy, v, B, *none[:3], SCALE, True, True)[0]
        ops.lora_in_grads_(dx, dv, x, A, *mask, SCALE)

    there = kernels_of(gradients)
    assert len(there) == backward, there


def test_nothing_waits_for_the_host():
    x, W, A, B = layer(M=64)

    magnitude = magnitude_of(W)

    def step():
        for p in (0.0, 0.1):
            y = lk.lora_linear(x, W, A, B, dropout=p, training=True)
            torch.autograd.grad(y, (x, A, B), torch.ones_like(y))
            y = lk.lora_linear(x, W, A, B, dropout=p, training=True, magnitude=magnitude)
            torch.autograd.grad(y, (x, A, B, magnitude), torch.ones_like(y))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
