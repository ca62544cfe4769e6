"""The ``quantized`` kernels in the checking interpreter, against the reference in float64 and its bits."""

import itertools

import pytest
import torch
from layouts import strided
from lora_kernels.kernels.triton import _device, low_rank, quantized

import lora_kernels as lk
from lora_kernels import select
from lora_kernels.ops import _quantized as ops
from lora_kernels.quantization.tables import FP4, INT4, NF4
from lora_kernels.reference import quantized as reference
from lora_kernels.testing import LOW_RANK_DTYPES, assert_within_rule, bitwise_equal, rms

DTYPES = ("fp32", "bf16", "fp16", "bf16-masters", "fp16-masters")
FORMATS = {"nf4": NF4, "fp4": FP4, "int4": INT4, "int8": None}
# M, N, K, group, R, with outputs enough for an RMS: odd; groups of more than one block, of several to a block, across
# blocks; a sum that programs share; rows in one high tile and in several.
SIZES = (
    (1, 260, 259, 7, 3), (300, 1, 1, 1, 1), (5, 60, 192, 64, 16), (2, 140, 600, 24, 40), (9, 33, 515, 515, 8),
    (40, 72, 130, 32, 20), (150, 136, 96, 16, 16),
)  # fmt: skip
SCALE = 0.7


@pytest.fixture(autouse=True)
def triton_backend():
    with lk.backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names = []
    for module in (low_rank, quantized):
        launch = module.launch

        def noting(kernel, *rest, launch=launch, **named):
            names.append(kernel.fn.__name__)
            return launch(kernel, *rest, **named)

        monkeypatch.setattr(module, "launch", noting)
    return names


def packed(fmt, N, K, group, seed=0):
    """(codes, scales, offsets, table, group) of a random weight; a code past an odd K is not 0."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-K // group)
    scales = (torch.rand(N, groups, generator=generator) + 0.5) / K**0.5
    if fmt == "int8":
        return torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator), scales / 64, None, None, group
    codes = torch.randint(0, 256, (N, -(-K // 2)), generator=generator).to(torch.uint8)
    offsets = None
    if fmt == "int4":
        scales = scales / 4
        offsets = -7.5 * scales + 0.1 * torch.randn(N, groups, generator=generator)
    return codes, scales, offsets, torch.tensor(FORMATS[fmt]), group


def in_fp64(args):
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return [[t.double() for t in a] if isinstance(a, list) else a for a in wide]


def check_linear(x, weight, bias=None, v=None, B=(), routing=(None,) * 6, scale=SCALE):
    """The op against float64; plain PyTorch rounds the weight, the product and the adapter's part."""
    args = (x, *weight, bias, v, list(B), *routing, scale)
    want = reference.quantized_linear(*in_fp64(args))
    W = reference.dequantized(*weight, x.shape[-1], x.dtype)
    yardstick = torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))
    if v is not None:
        nothing = torch.zeros(*yardstick.shape, dtype=torch.float32)
        reference.lora_expand_(nothing, v, [b.float() for b in B], *routing, scale)
        yardstick = yardstick + nothing.to(x.dtype)
    got = ops.quantized_linear(*args)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    assert_within_rule(got, want, yardstick, noise=noise(x, want))
    return got


def check_grad(dy, weight, K, v=None, A=None):
    args = (dy, *weight, K, v, A, SCALE)
    want = reference.quantized_linear_grad(*in_fp64(args))
    yardstick = dy @ reference.dequantized(*weight, K, dy.dtype)
    if v is not None:
        yardstick = yardstick + (SCALE * (v @ A.float())).to(dy.dtype).view(yardstick.shape)
    got = ops.quantized_linear_grad(*args)
    assert got.dtype == dy.dtype
    assert got.is_contiguous()
    assert_within_rule(got, want, yardstick, noise=noise(dy, want))
    return got


def noise(x, want):
    return 2**-20 * rms(want) if x.dtype == torch.float32 else 0.0


def every():
    """Every format and size in bf16, every dtype at a few."""
    few = (("nf4", SIZES[2]), ("int4", SIZES[3]), ("int8", SIZES[5]))
    cases = [("bf16", *one) for one in itertools.product(FORMATS, SIZES)]
    cases += [(name, *one) for name, one in itertools.product(DTYPES, few) if name != "bf16"]
    return [pytest.param(name, fmt, *size, id=f"{name}-{fmt}-{'-'.join(map(str, size))}") for name, fmt, size in cases]


@pytest.mark.parametrize(
    "fmt, group", [*(("int4", group) for group in (1, 7, 16, 32, 48, 64, 256, 1000)), *((f, 64) for f in FORMATS)]
)
def test_dequantize_has_the_bits(fmt, group):
    N, K = 21, 301
    weight = packed(fmt, N, K, group)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for row, column, rows, columns in ((0, 0, N, K), (3, 128, 9, 64), (20, 131, 1, 170), (5, 300, 4, 1)):
            want = reference.dequantized(*weight, K, dtype)[row : row + rows, column : column + columns]
            around = torch.full((rows, 2 * columns), float("nan"), dtype=dtype)
            for out in (torch.empty_like(want), torch.empty_like(want.T).T, around[:, ::2]):
                ops.dequantize_(out, *weight, row, column)
                assert bitwise_equal(out, want)
            assert around[:, 1::2].isnan().all()


def test_dequantize_rounds_the_product_and_the_sum(monkeypatch):
    """Compiled, a fused multiply-add would have other bits; the interpreter has none."""
    launch, options = quantized.launch, []

    def noting(*args, **named):
        options.append(named)
        return launch(*args, **named)

    monkeypatch.setattr(quantized, "launch", noting)
    ops.dequantize_(torch.empty(2, 4), *packed("int4", 2, 4, 4), 0, 0)
    assert [o["enable_fp_fusion"] for o in options] == [False]


@pytest.mark.parametrize("name, fmt, M, N, K, group, R", every())
def test_linear(name, fmt, M, N, K, group, R, launched):
    dtypes, weight = LOW_RANK_DTYPES[name], packed(fmt, N, K, group)
    x, v, B = torch.randn(M, K).to(dtypes.x), torch.randn(1, M, R), torch.randn(N, R).to(dtypes.factors)
    bias = torch.randn(N).to(dtypes.x if R % 2 else torch.float32)
    split = select.quantized_tiles(M, N, K, group, dtypes.x, dtypes.factors, _device.gpu(x.device)).split
    check_linear(x, weight)
    check_linear(x, weight, bias, v, [B])
    assert launched == ["linear_kernel"] * 2
    assert split > 1 or K < 515 or dtypes.x == torch.float32


@pytest.mark.parametrize("name, fmt, M, N, K, group, R", every())
def test_grad(name, fmt, M, N, K, group, R):
    dtypes, weight = LOW_RANK_DTYPES[name], packed(fmt, N, K, group)
    dy, v, A = torch.randn(M, N).to(dtypes.x), torch.randn(M, R), torch.randn(R, K).to(dtypes.factors)
    check_grad(dy, weight, K)
    check_grad(dy, weight, K, v, A)


@pytest.mark.parametrize("name", ("fp32", "bf16"))
def test_grad_of_a_long_sum(name):
    """Shared by programs, whose last has less to do."""
    dtype, (M, N, K, R) = LOW_RANK_DTYPES[name].x, (4, 1100, 70, 12)
    tile = select.quantized_grad_tiles(M, N, K, 32, dtype, dtype, _device.gpu(torch.device("cpu")))
    assert tile.split > 1
    assert N % (tile.steps * tile.block_n)
    dy, v, A = torch.randn(M, N).to(dtype), torch.randn(M, R), torch.randn(R, K).to(dtype)
    check_grad(dy, packed("nf4", N, K, 32), K, v, A)


@pytest.mark.parametrize("name", ("fp32", "bf16", "fp16-masters"))
@pytest.mark.parametrize("M, K", ((5, 600), (40, 96)))
def test_many_adapters(name, M, K, launched):
    """Rows with an adapter of their own and without, by ids, plan and segments; slices, ranks, scaling and mixtures."""
    dtypes, group, L, R, widths = LOW_RANK_DTYPES[name], 32, 3, 8, (24, 40)
    N = sum(widths)
    weight, x, bias = packed("nf4", N, K, group), torch.randn(M, K).to(dtypes.x), torch.randn(N)
    B = [torch.randn(L, n, R).to(dtypes.factors) for n in widths]
    ids, v = torch.randint(-1, L, (M,)), torch.randn(2, M, R)
    scaling, ranks = torch.rand(2, L), torch.randint(0, R + 1, (2, L), dtype=torch.int32)
    by_ids = check_linear(x, weight, bias, v, B, (ids, None, None, scaling, ranks, None))
    assert [n for n in launched if n != "plan_kernel"] == ["linear_kernel", "expand_kernel"]
    table = lk.BatchPlan.from_ids(ids, L).table
    planned = check_linear(x, weight, bias, v, B, (None, None, table, scaling, ranks, None))
    assert bitwise_equal(planned, by_ids)
    indptr = torch.tensor([0, 2, M - 1])
    check_linear(x, weight, None, v, B, (torch.tensor([2, 0]), indptr, None, None, None, None))
    pairs, weights = torch.randint(-1, L, (M, 2)), torch.rand(M, 2)
    check_linear(x, weight, None, torch.randn(2, 2 * M, R), B, (pairs, None, None, scaling, None, weights))
    listed = [torch.randn(N, r).to(dtypes.factors) for r in (8, 2, 5)]
    check_linear(x, weight, None, v[:1], listed, (ids, None, None, None, None, None))


def test_one_adapter_that_is_no_plain_pair(launched):
    """Of several slices, or with a scaling of its own: by the expand; a stack of one: in the product."""
    M, N, K, R = 4, 80, 64, 4
    weight, x, v = packed("nf4", N, K, 64), torch.randn(M, K).bfloat16(), torch.randn(1, M, R)
    B = torch.randn(1, N, R).bfloat16()
    check_linear(x, weight, None, v, [B])
    assert launched == ["linear_kernel"]
    for slices, scaling, ranks in ((1, torch.tensor([0.3]), None), (1, None, torch.tensor([2])), (2, None, None)):
        launched.clear()
        parts = list(B.split(N // slices, 1))
        check_linear(x, weight, None, v.expand(slices, M, R), parts, (None, None, None, scaling, ranks, None))
        assert launched == ["linear_kernel", "expand_kernel"]


@pytest.mark.parametrize("fmt", ("int4", "int8"))
def test_any_strides(fmt):
    """The same bits as in rows side by side."""
    M, N, K, R, group = 6, 60, 72, 5, 24
    codes, scales, offsets, table, _ = weight = packed(fmt, N, K, group)
    x, dy = torch.randn(2, 3, K).bfloat16(), torch.randn(2, 3, N).bfloat16()
    v, B, A, bias = torch.randn(1, M, R), torch.randn(N, R), torch.randn(R, K), torch.randn(N)
    y = check_linear(x, weight, bias, v, [B])
    dx = check_grad(dy, weight, K, v[0], A)
    assert y.shape == dy.shape
    assert dx.shape == x.shape
    spread = [None if t is None else strided(t) for t in (codes, scales, offsets, table)]
    wide = strided(v), [B.T.contiguous().T], strided(bias)
    for turned in (strided, lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)):
        routing = (None,) * 6
        got = ops.quantized_linear(turned(x), *spread, group, wide[2], wide[0], wide[1], *routing, SCALE)
        assert bitwise_equal(got, y)
        got = ops.quantized_linear_grad(turned(dy), *spread, group, K, wide[0][0], strided(A), SCALE)
        assert bitwise_equal(got, dx)
    routing = (None, None, [], *(None,) * 6, 1.0)
    expanded = ops.quantized_linear(x[:1, :1].expand(2, 3, K), *weight, *routing)
    assert bitwise_equal(expanded, ops.quantized_linear(x[:1, :1].repeat(2, 3, 1), *weight, *routing))


@pytest.mark.parametrize("M, N, K", ((0, 8, 16), (3, 0, 16), (3, 8, 0)))
def test_nothing_to_do(M, N, K):
    weight = packed("nf4", N, K, 8)
    v, B, A = torch.randn(1, M, 4), torch.randn(N, 4), torch.randn(4, K)
    args = torch.randn(M, K), *weight, torch.randn(N), v, [B], *(None,) * 6, SCALE
    assert bitwise_equal(ops.quantized_linear(*args), reference.quantized_linear(*args))
    args = torch.randn(M, N), *weight, K, v[0], A, SCALE
    assert bitwise_equal(ops.quantized_linear_grad(*args), reference.quantized_linear_grad(*args))
    ops.dequantize_(torch.empty(N, K), *weight, 0, 0)


@pytest.mark.parametrize("name", ("fp32", "bf16"))
@pytest.mark.parametrize("M, N, K, group, R", SIZES[2:])
def test_tiles_of_amd(name, M, N, K, group, R, monkeypatch):
    """With fewer programs to share a sum."""
    monkeypatch.setattr(_device, "gpu", lambda device: select.Gpu(programs=2))
    dtype, weight = LOW_RANK_DTYPES[name].x, packed("nf4", N, K, group)
    x, dy, v = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), torch.randn(M, R)
    check_linear(x, weight, None, v[None], [torch.randn(N, R).to(dtype)])
    check_grad(dy, weight, K, v, torch.randn(R, K).to(dtype))


def test_what_is_not_a_number_stays_in_its_row():
    N, K = 40, 128
    codes, scales, _, table, group = packed("nf4", N, K, 64)
    scales[3, 1] = float("nan")
    x = torch.randn(5, K)
    x[2, 7] = float("nan")
    y = ops.quantized_linear(x, codes, scales, None, table, group, None, None, [], *(None,) * 6, 1.0)
    wrong = torch.zeros(5, N, dtype=torch.bool)
    wrong[2], wrong[:, 3] = True, True
    assert torch.equal(y.isnan(), wrong)
