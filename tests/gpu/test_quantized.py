"""``quantized`` on a GPU: its ops against the reference in fp64, its bits, a layer in training, a captured graph."""

import itertools

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import _quantized as ops
from lora_kernels.quantization.tables import INT4, NF4
from lora_kernels.quantization.weight import QuantizedWeight
from lora_kernels.reference import quantized as reference
from lora_kernels.testing import LOW_RANK_DTYPES, assert_within_rule, bitwise_equal, rms

DTYPES = ("fp32", "bf16", "fp16", "bf16-masters", "fp16-masters")
TABLES = {"nf4": NF4, "int4": INT4, "int8": None}
# M, N, K, group, R
SIZES = (
    (1, 260, 259, 7, 3), (1, 1032, 4096, 64, 16), (37, 130, 1030, 1030, 20), (300, 520, 600, 24, 40),
    (700, 1096, 1024, 128, 64),
)  # fmt: skip
SCALE = 0.7


def randn(*size, dtype=torch.float32):
    return torch.randn(size, device="cuda").to(dtype)


def packed(fmt, N, K, group):
    """(codes, scales, offsets, table, group) of a random weight."""
    groups = -(-K // group)
    scales = (torch.rand(N, groups, device="cuda") + 0.5) / K**0.5
    if fmt == "int8":
        return torch.randint(-128, 128, (N, K), dtype=torch.int8, device="cuda"), scales / 64, None, None, group
    codes = torch.randint(0, 256, (N, -(-K // 2)), device="cuda").to(torch.uint8)
    offsets = None
    if fmt == "int4":
        scales = scales / 4
        offsets = -7.5 * scales + 0.1 * torch.randn_like(scales)
    return codes, scales, offsets, torch.tensor(TABLES[fmt], device="cuda"), group


def in_fp64(args):
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return [[t.double() for t in a] if isinstance(a, list) else a for a in wide]


def check(op, args, plain):
    """An op against its reference in fp64, and against itself; ``plain``: the same in plain PyTorch."""
    got, want = op(*args), op.reference(*in_fp64(args))
    assert bitwise_equal(got, op(*args))
    noise = (2**-19 if got.dtype == torch.float32 else 0) * rms(want)
    assert_within_rule(got.cpu(), want.cpu(), plain.cpu(), noise=noise)


def test_kernels_are_what_runs():
    ran = {op.op: op.backend for op in lk.info().ops if op.device == "cuda" and op.family == "quantized"}
    assert set(ran.values()) == {"triton"}


@pytest.mark.parametrize("M, N, K, group, R", SIZES)
@pytest.mark.parametrize("fmt", TABLES)
def test_dequantize_has_the_bits(fmt, M, N, K, group, R):
    weight = packed(fmt, N, K, group)
    moved = [t.cpu() if isinstance(t, torch.Tensor) else t for t in weight]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want = reference.dequantized(*moved, K, dtype)
        for rows, columns in ((slice(0, N), slice(0, K)), (slice(3, 100), slice(131, 257))):
            part = want[rows, columns]
            out = torch.empty_like(part, device="cuda")
            ops.dequantize_(out, *weight, rows.start, columns.start)
            assert bitwise_equal(out.cpu(), part)


@pytest.mark.parametrize("name, fmt", [*itertools.product(DTYPES, ("nf4", "int4")), ("bf16", "int8"), ("fp32", "int8")])
@pytest.mark.parametrize("M, N, K, group, R", SIZES)
def test_products(name, fmt, M, N, K, group, R):
    dtypes, weight = LOW_RANK_DTYPES[name], packed(fmt, N, K, group)
    x, dy, v, bias = randn(M, K, dtype=dtypes.x), randn(M, N, dtype=dtypes.x), randn(1, M, R), randn(N)
    A, B = randn(R, K, dtype=dtypes.factors), randn(N, R, dtype=dtypes.factors)
    W = reference.dequantized(*weight, K, dtypes.x)
    routing = (None,) * 6
    plain = torch.nn.functional.linear(x, W)
    check(ops.quantized_linear, (x, *weight, None, None, [], *routing, 1.0), plain)
    plain = plain + bias.to(x.dtype) + (SCALE * v[0] @ B.float().T).to(x.dtype)
    check(ops.quantized_linear, (x, *weight, bias, v, [B], *routing, SCALE), plain)
    ids = torch.randint(-1, 3, (M,), device="cuda")
    many = [randn(3, n, R, dtype=dtypes.factors) for n in (N // 2, N - N // 2)]
    args = (x, *weight, bias, randn(2, M, R), many, ids, *routing[1:], SCALE)
    delta = torch.zeros_like(plain, dtype=torch.float32)
    reference.lora_expand_(delta, args[7], many, ids, *routing[1:], SCALE)
    check(ops.quantized_linear, args, torch.nn.functional.linear(x, W, bias.to(x.dtype)) + delta.to(x.dtype))
    check(ops.quantized_linear_grad, (dy, *weight, K, None, None, 1.0), dy @ W)
    plain = dy @ W + (SCALE * v[0] @ A.float()).to(x.dtype)
    check(ops.quantized_linear_grad, (dy, *weight, K, v[0], A, SCALE), plain)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("M", (1, 2048))
def test_layer(dtype, M):
    N, K, R = 512, 1024, 16
    codes, scales, _, table, group = packed("nf4", N, K, 64)
    weight = QuantizedWeight("nf4", codes, scales, shape=(N, K), group_size=group, dtype=dtype, table=table)
    x, A, B = (t.requires_grad_() for t in (randn(M, K, dtype=dtype), randn(R, K) / K**0.5, randn(N, R)))
    y = lk.quantized_lora_linear(x, weight, A, B, scaling=SCALE)
    dy = torch.randn_like(y)
    got = y, *torch.autograd.grad(y, (x, A, B), dy)
    W = reference.dequantized(*weight.packed, K, torch.float64)
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B)]
    exact = leaves[0] @ W.T + SCALE * (leaves[0] @ leaves[1].T) @ leaves[2].T
    limit = 2**-8 if dtype == torch.bfloat16 else 2**-18  # half a rounding of the terms
    for g, w in zip(got, (exact, *torch.autograd.grad(exact, leaves, dy.double())), strict=True):
        assert rms(g.detach().double() - w.detach()) <= limit * rms(w.detach())


@pytest.mark.parametrize("M", (1, 300))
def test_a_graph_has_the_bits(M):
    N, K, R = 520, 1024, 8
    weight, B = packed("int4", N, K, 128), randn(3, N, R).bfloat16()
    x, v, ids = randn(M, K).bfloat16(), randn(1, M, R), torch.randint(-1, 3, (M,), device="cuda")
    args = (x, *weight, None, v, [B], ids, *(None,) * 5, SCALE)
    ops.quantized_linear(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.quantized_linear(*args)
    for t in (x, v):
        t.copy_(torch.randn_like(t))
    graph.replay()
    assert bitwise_equal(y, ops.quantized_linear(*args))
