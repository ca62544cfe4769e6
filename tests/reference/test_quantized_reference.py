"""``quantize`` against bitsandbytes, bit for bit, and against plain loops where bitsandbytes has none for the CPU."""

import math

import numpy as np
import pytest
import torch
from quantized_formats import VALUES, gptq_by_hand, same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_kernels as lk
from lora_kernels import QuantizedWeight
from lora_kernels.quantization import bitsandbytes, quantisers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((6, 128), (7, 33), (1, 100), (1, 1), (300, 1), (3, 1023), (40, 416))


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def theirs(bnb, W, fmt, blocksize, nested):
    data, state = bnb.functional.quantize_4bit(W, blocksize=blocksize, quant_type=fmt, compress_statistics=nested)
    return {"weight": data, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}


def with_edges(W):
    """Zeros, numbers too small for an inverse, and an absmax that is negative."""
    W.view(-1)[:: max(W.numel() // 7, 1)] = 0
    if W.shape[0] > 5:
        W[1], W[2], W[3] = 0, 1e-39, -3
    return W


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", SHAPES)
def test_bits_of_bitsandbytes(bnb, N, K, dtype, fmt, nested):
    W = with_edges(torch.randn(N, K)).to(dtype)
    weight = lk.quantize(W, fmt, nested=nested)
    assert (weight.fmt, weight.shape, weight.dtype) == (fmt, (N, K), dtype)
    assert same_bits(weight.state_dict(), theirs(bnb, W, fmt, 64, nested))


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
@pytest.mark.parametrize("blocksize", (32, 64, 128, 256, 512, 1024, 2048, 4096))
def test_blocksizes(bnb, blocksize, fmt, nested, monkeypatch):
    """Also in panels of a few rows, which must end where a block does."""
    W = torch.randn(70, 130)
    expected = theirs(bnb, W, fmt, blocksize, nested)
    for panel in (quantisers.PANEL, 500):
        monkeypatch.setattr(quantisers, "PANEL", panel)
        assert same_bits(lk.quantize(W, fmt, group_size=blocksize, nested=nested).state_dict(), expected)


@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
def test_numbers_between_two_values(bnb, fmt):
    """On the middles of the values, just past them on both sides, and on the values."""
    value = torch.tensor(sorted(VALUES[fmt]))
    middle = (value[1:] + value[:-1]) / 2
    x = torch.cat([value, middle, *(middle.nextafter(torch.tensor(end)) for end in (-2.0, 2.0)), torch.zeros(1)])
    W = torch.nn.functional.pad(x, (0, 128 - len(x)), value=1.0).view(2, 64)
    for scale in (1.0, 0.7):
        assert same_bits(lk.quantize(W * scale, fmt).state_dict(), theirs(bnb, W * scale, fmt, 64, False))


@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
def test_between_two_values_at_the_end(bnb, fmt):
    """After the last whole block bitsandbytes divides, which can round to the other side of a middle."""
    value = torch.tensor(sorted(VALUES[fmt]))
    x = torch.cat([(value[1:] + value[:-1]) / 2, torch.ones(64 - 15), (value[1:] + value[:-1]) / 2, torch.ones(1)])
    for scale in torch.rand(200):
        W = (x * scale)[None]
        assert same_bits(lk.quantize(W, fmt).state_dict(), theirs(bnb, W, fmt, 64, False))


def test_statistics_between_two_bins(bnb):
    """On the edges of the bins from where on another value is the nearest, times many scales."""
    _, bins = quantisers._middles()
    edges = 2 * (bins.int().diff().nonzero()[:, 0] + 0.5) / 65535 - 1
    absmax = torch.cat((edges, torch.ones(256 - len(edges)))) * (torch.rand(1000, 1) + 0.5)
    codes, top = quantisers._compressed(absmax.flatten(), "cpu")
    expected, state = bnb.functional.quantize_blockwise(absmax.flatten(), blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(top, state.absmax)


def test_many_statistics(bnb):
    """Nested, with an absmax at every scale, many blocks of it and a last one that is not whole."""
    W = torch.randn(3000, 65) * torch.logspace(-20, 20, 3000)[:, None]
    assert same_bits(lk.quantize(W, "nf4", nested=True).state_dict(), theirs(bnb, W, "nf4", 64, True))


def test_dynamic_map(bnb):
    assert torch.equal(quantisers.dynamic_map(), bnb.functional.create_dynamic_map())


@pytest.mark.parametrize("fmt, group_size", (("nf4", 64), ("fp4", 32), ("int8", None), ("int4", 8)))
def test_strides(fmt, group_size):
    W = torch.randn(48, 40)
    plain = lk.quantize(W, fmt, group_size=group_size).state_dict()
    columns = W.T.contiguous().T
    apart = torch.randn(48, 2, 80)
    apart[:, 1, ::2] = W
    assert not columns.is_contiguous()
    for strided in (columns, apart[:, 1, ::2], torch.nn.Parameter(W)):
        assert same_bits(lk.quantize(strided, fmt, group_size=group_size).state_dict(), plain)
    row = W[:1].contiguous()
    expanded = lk.quantize(row.expand(8, 40), fmt, group_size=group_size)
    assert same_bits(expanded.state_dict(), lk.quantize(row.repeat(8, 1), fmt, group_size=group_size).state_dict())


@pytest.mark.parametrize("fmt", ("nf4", "fp4", "int8", "int4"))
@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("N, K", ((0, 128), (3, 0), (0, 0)))
def test_empty(N, K, nested, fmt):
    if nested and fmt.startswith("int"):
        return
    weight = lk.quantize(torch.empty(N, K), fmt, nested=nested)
    assert weight.shape == (N, K)
    assert weight.dequantize().shape == (N, K)
    assert weight.scales.shape == (N, -(-K // weight.group_size))
    if fmt != "int4":
        again = QuantizedWeight.from_state_dict(weight.state_dict())
        assert same_bits(again.state_dict(), weight.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", SHAPES)
def test_rows_of_bitsandbytes(bnb, N, K, dtype, monkeypatch):
    W = torch.randn(N, K)
    if N > 1:
        W[1] = 0
    W = W.to(dtype)
    CB, SCB, _ = bnb.functional.int8_vectorwise_quant(W.clone())
    for panel in (quantisers.PANEL, 500):
        monkeypatch.setattr(quantisers, "PANEL", panel)
        weight = lk.quantize(W, "int8")
        assert weight.dtype == dtype
        assert same_bits(
            weight.state_dict(), {"weight": CB, "SCB": SCB, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        )


FP4_OF_CUDA = (0.29166667, 0.583333, 0.8333333, 0.4166667, 0.0859375, 0.20833333, 0.00260417)


def _codes_of_cuda(x, fmt):
    """The code that bitsandbytes' CUDA kernel gives x / absmax: its comparisons, all false of a NaN."""
    if fmt == "nf4":
        value = np.array(VALUES[fmt], np.float32)
        return sum(x > (value[i] + value[i + 1]) / np.float32(2) for i in range(15))
    over = [abs(x) > np.float32(t) for t in FP4_OF_CUDA]
    if over[0]:
        code = (3 if over[2] else 2) if over[1] else (5 if over[3] else 4)
    else:
        code = (7 if over[5] else 6) if over[4] else int(over[6])
    return code + 8 * int(x < 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
def test_rule_of_cuda(fmt):
    """Its code has no CPU: what is asked of CUDA tensors, here on the CPU, against the comparisons one by one."""
    bounds = torch.tensor(FP4_OF_CUDA)
    W = torch.cat([torch.randn(190), torch.zeros(66), bounds, -bounds, torch.ones(1), torch.randn(30) * 1e-3])
    codes, absmax = quantisers._codes(W, fmt, 64, "cuda")
    for b, block in enumerate(W.split(64)):
        largest = np.float32(block.abs().max())
        assert absmax[b] == largest
        inverse = np.float32(1) / largest
        expected = [int(_codes_of_cuda(np.float32(w) * inverse, fmt)) for w in block.numpy()]
        assert codes[64 * b :][: len(block)].tolist() == expected, b


def _search_of_cuda(code, x):
    """bitsandbytes' binary search of the nearest of 256 values in CUDA."""
    pivot, above, below = 127, 255, 0
    for step in (64, 32, 16, 8, 4, 2, 1):
        if x > code[pivot]:
            below, pivot = pivot, pivot + step
        else:
            above, pivot = pivot, pivot - step
    if x > code[pivot]:
        return above if x > (code[above] + code[pivot]) * np.float32(0.5) else pivot
    return below if x < (code[below] + code[pivot]) * np.float32(0.5) else pivot


def test_nested_rule_of_cuda():
    code = quantisers.dynamic_map().numpy()
    middles = (code[1:] + code[:-1]) * np.float32(0.5)
    d = torch.cat([torch.from_numpy(middles), torch.ones(1), torch.from_numpy(code), torch.zeros(256), torch.randn(99)])
    idx, top = quantisers._compressed(d, "cuda")
    for b, block in enumerate(d.split(256)):
        largest = block.abs().max().numpy()
        assert top[b] == largest
        if largest == 0:  # 0 times infinity compares false throughout
            assert not idx[256 * b :][: len(block)].any()
            continue
        expected = [_search_of_cuda(code, x) for x in block.numpy() * (np.float32(1) / largest)]
        assert idx[256 * b :][: len(block)].tolist() == expected, b


def _int4_by_hand(W, g, symmetric):
    """(W, q, s, z) in plain numbers."""
    out = torch.zeros(W.shape, dtype=torch.float64)
    scales = torch.zeros(W.shape[0], W.shape[1] // g, dtype=torch.float64)
    for n, row in enumerate(W.double().tolist()):
        for i in range(0, len(row), g):
            low, high = min(0.0, *row[i : i + g]), max(0.0, *row[i : i + g])
            s = 2 * max(-low, high) / 15 if symmetric else max((high - low) / 15, high / 14)
            s = float(torch.tensor(s, dtype=torch.float32).half())
            z = 8 if symmetric or not s else min(max(round(-low / s), 1), 15)
            for k in range(i, i + g):
                q = min(max(round(row[k] / s) + z, 0), 15) if s else z
                out[n, k] = s * (q - z)
            scales[n, i // g] = s
    return out, scales


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K, g", ((8, 32, 8), (3, 10, 5), (16, 24, 24), (5, 7, 1), (1, 9, 9), (6, 1, 1)))
def test_int4(N, K, g, dtype, symmetric, monkeypatch):
    W = torch.randn(N, K)
    W[0] = 0
    if N > 4:
        W[1], W[2] = W[1].abs() + 1, -W[2].abs() - 1
    W = W.to(dtype)
    expected, s = _int4_by_hand(W, g, symmetric)
    for panel in (quantisers.PANEL, 30):
        monkeypatch.setattr(quantisers, "PANEL", panel)
        weight = lk.quantize(W, "int4", group_size=g, symmetric=symmetric)
        assert (weight.fmt, weight.shape, weight.group_size, weight.dtype) == ("int4", (N, K), g, dtype)
        assert torch.equal(weight.scales.double(), s)
        got = weight.dequantize(torch.float32).double()
        # A number halfway between two codes may go either way, by the rounding of w / s to fp32.
        off = (got - expected).abs()
        tie = ((W.double() / s.repeat_interleave(g, 1)).remainder(1) - 0.5).abs() < 1e-5
        assert off[~tie].eq(0).all()
        assert off.le(s.repeat_interleave(g, 1)).all()


@pytest.mark.parametrize("symmetric", (True, False))
def test_int4_is_near(symmetric):
    """No number is further off than half a step, and what fp16 rounds of 16 of those."""
    W = torch.randn(16, 256)
    W[0], W[1] = W[0].abs() + 1, -W[1].abs() - 1
    weight = lk.quantize(W, "int4", symmetric=symmetric)
    s = weight.scales.repeat_interleave(128, dim=1)
    assert ((weight.dequantize() - W).abs() <= s * (0.5 + 16 * 2**-11)).all()


@pytest.mark.parametrize("symmetric", (True, False))
def test_int4_as_gptq(symmetric):
    weight = lk.quantize(torch.randn(16, 48), "int4", group_size=16, symmetric=symmetric)
    tensors = weight.state_dict("x.")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "x.qweight": (torch.int32, (6, 16)), "x.qzeros": (torch.int32, (3, 2)), "x.scales": (torch.float16, (3, 16)),
        "x.g_idx": (torch.int32, (48,)),
    }  # fmt: skip
    W = weight.dequantize(torch.float32)
    assert torch.equal(gptq_by_hand({name[2:]: t for name, t in tensors.items()}, 1), W.double())
    again = QuantizedWeight.from_state_dict(tensors, "x.")
    assert torch.equal(again.dequantize(torch.float32), W)
    assert same_bits(again.state_dict("x."), tensors)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor made inside."""

    def __init__(self, given):
        super().__init__()
        self.given, self.nbytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.nbytes = max([self.nbytes, *(s.nbytes() for s in made if s.data_ptr() != self.given)])
        return out


@pytest.mark.parametrize("fmt", ("nf4", "fp4", "int4", "int8"))
def test_memory(fmt, monkeypatch):
    """Nothing as large as the weight is made: panels, and the result."""
    monkeypatch.setattr(quantisers, "PANEL", 1 << 12)
    W = torch.randn(512, 256).bfloat16()
    with Largest(W) as largest:
        weight = lk.quantize(W, fmt)
    assert weight.codes.nbytes <= largest.nbytes < W.nbytes


FAULTS = (
    ([[1.0]], "nf4", {}, TypeError, "weight must be a tensor, got list"),
    (torch.ones(2, 64).double(), "nf4", {}, TypeError, "weight must be float32, .* got torch.float64"),
    (torch.ones(2, 64).int(), "int8", {}, TypeError, "weight must be float32, bfloat16 or float16, got torch.int32"),
    (torch.ones(64), "nf4", {}, ValueError, r"weight must be \[N, K\], got \[64\]"),
    (torch.ones(2, 2, 64), "int4", {}, ValueError, r"weight must be \[N, K\], got \[2, 2, 64\]"),
    (torch.ones(2, 64), "nf5", {}, ValueError, "fmt must be one of nf4, fp4, int4, int8, got 'nf5'"),
    (torch.ones(2, 64), "nf4", {"group_size": 48}, ValueError, "group_size must be one of .* for nf4, got 48"),
    (torch.ones(2, 64), "nf4", {"group_size": 64.0}, TypeError, "group_size must be an int or None, got float"),
    (torch.ones(2, 64), "int4", {"group_size": True}, TypeError, "group_size must be an int or None, got bool"),
    (torch.ones(2, 64), "int4", {}, ValueError, r"a positive divisor of K for int4, got 128 for weight \[2, 64\]"),
    (torch.ones(2, 64), "int4", {"group_size": 0}, ValueError, "a positive divisor of K for int4, got 0"),
    (torch.ones(2, 64), "int4", {"group_size": -64}, ValueError, "a positive divisor of K for int4, got -64"),
    (torch.ones(2, 64), "int8", {"group_size": 64}, ValueError, "group_size must be None for int8.*got 64"),
    (torch.ones(2, 128), "int4", {"nested": True}, ValueError, "nested is for nf4 and fp4, got fmt 'int4'"),
    (torch.ones(2, 128), "int8", {"nested": True}, ValueError, "nested is for nf4 and fp4, got fmt 'int8'"),
    (torch.ones(2, 128), "nf4", {"symmetric": False}, ValueError, "symmetric=False is for int4, got fmt 'nf4'"),
    (torch.full((1, 128), 6e5), "int4", {}, ValueError, r"weight \[1, 128\] must be finite in fp16 at the scale"),
)  # fmt: skip


@pytest.mark.parametrize("weight, fmt, options, error, message", FAULTS)
def test_faults(weight, fmt, options, error, message):
    with pytest.raises(error, match=message):
        lk.quantize(weight, fmt, **options)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("at", ((0, 0), (2, 130), (3, 255)))
@pytest.mark.parametrize("fmt", ("nf4", "fp4", "int4", "int8"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype, fmt, at, value):
    W = torch.randn(4, 256, dtype=dtype)
    W[at] = value
    for options in ({}, {"nested": True}) if fmt in bitsandbytes.TABLES else ({}, {"symmetric": fmt != "int4"}):
        with pytest.raises(ValueError, match=r"weight \[4, 256\] must be finite"):
            lk.quantize(W, fmt, **options)
