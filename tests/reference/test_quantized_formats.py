"""The formats of bitsandbytes, GPTQ and AWQ: the right numbers, shared where they can be, given back bit for bit."""

import copy
import subprocess
import sys

import pytest
import torch
from quantized_formats import absmax_by_hand, awq, awq_by_hand, blocks_by_hand, gptq, gptq_by_hand, same_bits

import lora_kernels as lk
from lora_kernels import QuantizedWeight
from lora_kernels.testing import bitwise_equal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Of W and a block: rows of whole blocks, blocks over the end of rows, odd K, one row, one column, a block over all.
BLOCKS = ((6, 128, 64), (6, 96, 64), (5, 33, 32), (4, 7, 64), (1, 70, 32), (67, 1, 32), (3, 40, 4096))


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def linear4bit(bnb, N, K, *, fmt="nf4", nested=False, blocksize=64, storage=torch.uint8, dtype=torch.bfloat16):
    layer = bnb.nn.Linear4bit(K, N, False, None, nested, fmt, storage)
    W = torch.randn(N, K, dtype=dtype)
    layer.weight = bnb.nn.Params4bit(
        W, False, blocksize=blocksize, compress_statistics=nested, quant_type=fmt, quant_storage=storage, module=layer
    )
    return layer.to("cpu")


def linear8bit(bnb, N, K):
    layer = bnb.nn.Linear8bitLt(K, N, False, has_fp16_weights=False)
    return layer.to("cpu")


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
@pytest.mark.parametrize("N, K, blocksize", BLOCKS)
def test_blocks(bnb, N, K, blocksize, fmt, nested):
    layer = linear4bit(bnb, N, K, fmt=fmt, nested=nested, blocksize=blocksize)
    weight = QuantizedWeight.from_bitsandbytes(layer.weight)
    state = layer.weight.quant_state
    W = blocks_by_hand(layer.weight.data, absmax_by_hand(state), fmt, (N, K), blocksize)
    assert torch.equal(weight.dequantize(torch.float32), W)
    assert (weight.fmt, weight.shape, weight.dtype) == (fmt, (N, K), torch.bfloat16)
    assert weight.codes.is_contiguous()
    assert same_bits(weight.state_dict(), dict(layer.state_dict()))


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_bitsandbytes(bnb, dtype, fmt, nested):
    layer = linear4bit(bnb, 16, 192, fmt=fmt, nested=nested, dtype=dtype)
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    ours = QuantizedWeight.from_bitsandbytes(layer.weight).dequantize()
    if fmt == "fp4":  # code 8 is -0 in some of bitsandbytes' kernels and 0 in others
        ours, theirs = ours + 0, theirs + 0
    assert bitwise_equal(ours, theirs)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("storage", (torch.uint8, *DTYPES))
def test_storage(bnb, storage, nested):
    layer = linear4bit(bnb, 6, 128, nested=nested, storage=storage)
    weight = QuantizedWeight.from_bitsandbytes(layer.weight)
    assert layer.weight.dtype == storage
    assert weight.codes.data_ptr() == layer.weight.data_ptr()
    assert nested or weight.scales.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
    state = weight.state_dict("layer.")
    assert state["layer.weight"].data_ptr() == layer.weight.data_ptr()
    assert same_bits(state, {f"layer.{name}": t for name, t in layer.state_dict().items()})


def test_transposed(bnb):
    """As it was passed to older kernels."""
    layer = linear4bit(bnb, 4, 64)
    weight = QuantizedWeight.from_bitsandbytes(layer.weight.data.t(), layer.weight.quant_state)
    assert weight.codes.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(weight.state_dict()["weight"], layer.weight.data.t())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_absmax(bnb, dtype):
    layer = linear4bit(bnb, 4, 128)
    state = layer.weight.quant_state
    state.absmax = state.absmax.to(dtype)
    weight = QuantizedWeight.from_bitsandbytes(layer.weight)
    W = blocks_by_hand(layer.weight.data, state.absmax.float(), "nf4", (4, 128), 64)
    assert torch.equal(weight.dequantize(torch.float32), W)
    assert same_bits(weight.state_dict(), dict(layer.state_dict()))


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("storage", (torch.uint8, torch.bfloat16))
def test_repacked_for_cpu(bnb, storage, nested):
    """What bitsandbytes' layer turns its weight into when it first runs in eval mode on some CPUs."""
    layer = linear4bit(bnb, 64, 128, nested=nested, storage=storage)
    codes = layer.weight.data.view(torch.uint8).clone()
    absmax = absmax_by_hand(layer.weight.quant_state).bfloat16()
    repack = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, copy.copy(layer.weight.quant_state))
    before = layer.weight.data.clone(), copy.copy(vars(layer.weight.quant_state))
    weight = QuantizedWeight.from_bitsandbytes(layer.weight)
    assert torch.equal(layer.weight.data, before[0])
    assert vars(layer.weight.quant_state) == before[1]

    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.codes.flatten(), codes.flatten())
    state = weight.state_dict()
    assert state["weight"].dtype == storage
    if nested:
        saved = dict(layer.state_dict())  # turns it back in place
        assert same_bits(state, saved)
        absmax = (absmax_by_hand_in(layer.weight.quant_state)).float()
    assert torch.equal(weight.scales.flatten(), absmax.float())


def absmax_by_hand_in(state):
    """Nested in bf16, as what was turned back is."""
    inner = state.state2
    value = inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(256)[: len(state.absmax)]
    return value.bfloat16() + state.offset


def test_rows(bnb):
    layer = linear8bit(bnb, 5, 33)
    weight = QuantizedWeight.from_bitsandbytes(layer.weight)
    assert weight.codes.data_ptr() == layer.weight.data_ptr()
    assert same_bits(weight.state_dict(), dict(layer.state_dict()))
    CB, SCB = layer.weight.CB.tolist(), layer.weight.SCB.tolist()
    W = torch.tensor([[c * s / 127 for c in row] for row, s in zip(CB, SCB, strict=True)], dtype=torch.float64)
    # The scale and the product are rounded to fp32 each.
    assert ((weight.dequantize(torch.float32) - W).abs() <= W.abs() * 2**-23).all()
    assert (weight.fmt, weight.group_size, weight.dtype) == ("int8", 33, torch.float16)


def test_rows_after_the_first_call(bnb):
    """bitsandbytes' layer then holds the statistics itself."""
    layer = linear8bit(bnb, 8, 32)
    saved = dict(layer.state_dict())
    layer.init_8bit_state()
    with pytest.raises(ValueError, match=r"weight \[8, 32\] in int8 has no SCB.*state\.SCB"):
        QuantizedWeight.from_bitsandbytes(layer.weight)
    assert same_bits(QuantizedWeight.from_bitsandbytes(layer.weight, layer.state.SCB).state_dict(), saved)


G_IDX = {
    "none": (32, 2, None),
    "in order": (32, 4, torch.arange(32) // 8),
    "act-order": (32, 4, torch.randperm(32, generator=torch.Generator().manual_seed(1)) // 8),
    "negative": (32, 4, torch.arange(32) // 8 - 4),
    "one group": (16, 1, torch.zeros(16, dtype=torch.int64)),
    "groups of 16, 16 and 8": (40, 3, torch.arange(40) // 16),
    "a group of none": (32, 3, torch.arange(32) // 16 * 2),
    "groups of one": (8, 8, torch.arange(8).flip(0)),
    "unequal and out of order": (40, 3, (torch.arange(40) // 16)[torch.randperm(40)]),
}


@pytest.mark.parametrize("checkpoint_format", ("gptq", "gptq_v2"))
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", G_IDX)
def test_gptq(case, dtype, checkpoint_format):
    K, groups, g_idx = G_IDX[case]
    tensors = gptq(16, K, groups, g_idx=None if g_idx is None else g_idx.int(), dtype=dtype)
    weight = QuantizedWeight.from_gptq(**tensors, checkpoint_format=checkpoint_format)
    assert (weight.fmt, weight.shape, weight.dtype) == ("int4", (16, K), dtype)
    assert (weight.order is None) == (case not in ("act-order", "groups of one", "unequal and out of order"))
    assert weight.codes.is_contiguous()
    W = gptq_by_hand(tensors, checkpoint_format == "gptq")
    assert torch.equal(weight.dequantize(torch.float32).double(), W)
    assert same_bits(weight.state_dict(), tensors)
    read = QuantizedWeight.from_state_dict(
        {f"a.{name}": t for name, t in tensors.items()}, "a.", checkpoint_format=checkpoint_format
    )
    assert torch.equal(read.dequantize(torch.float32).double(), W)


def test_gptq_in_fp32():
    """s q and s z are rounded each."""
    tensors = gptq(8, 16, 2, dtype=torch.float32)
    weight = QuantizedWeight.from_gptq(**tensors)
    W = gptq_by_hand(tensors, 1)
    largest = tensors["scales"].abs().max() * 16
    assert (weight.dequantize(torch.float32) - W).abs().max() <= largest * 2**-23
    assert same_bits(weight.state_dict(), tensors)


@pytest.mark.parametrize("N, K, groups", ((16, 32, 4), (8, 1, 1), (24, 7, 1), (8, 15, 3), (8, 8, 8)))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_awq(N, K, groups, dtype):
    tensors = awq(N, K, groups, dtype=dtype)
    weight = QuantizedWeight.from_awq(**tensors)
    assert (weight.fmt, weight.shape, weight.group_size, weight.dtype) == ("int4", (N, K), K // groups, dtype)
    assert weight.codes.is_contiguous()
    W = awq_by_hand(tensors)
    assert torch.equal(weight.dequantize(torch.float32).double(), W)
    assert same_bits(weight.state_dict(), tensors)
    assert torch.equal(QuantizedWeight.from_state_dict(tensors).dequantize(torch.float32).double(), W)


def test_through_a_file(bnb, tmp_path):
    save = pytest.importorskip("safetensors.torch")
    layers = {
        "nf4": linear4bit(bnb, 6, 128).state_dict(),
        "nested": linear4bit(bnb, 5, 33, fmt="fp4", nested=True, blocksize=32).state_dict(),
        "bf16": linear4bit(bnb, 6, 128, storage=torch.bfloat16).state_dict(),
        "int8": linear8bit(bnb, 5, 33).state_dict(),
        "gptq": gptq(16, 32, 4, g_idx=G_IDX["act-order"][2].int()),
        "awq": awq(16, 32, 4),
        "native int4": lk.quantize(torch.randn(16, 64), "int4", group_size=32).state_dict(),
    }
    tensors = {f"{layer}.{name}": t.contiguous() for layer, of in layers.items() for name, t in of.items()}
    others = {f"{layer}.{name}": torch.zeros(2) for layer in layers for name in ("bias", "lora_A.default.weight")}
    save.save_file(tensors | others, tmp_path / "model.safetensors")
    loaded = save.load_file(tmp_path / "model.safetensors")
    for layer, of in layers.items():
        weight = QuantizedWeight.from_state_dict(loaded, f"{layer}.")
        assert same_bits(weight.state_dict(), dict(of)), layer
        again = tmp_path / f"{layer}.safetensors"
        save.save_file({name: t.contiguous() for name, t in weight.state_dict().items()}, again)
        assert same_bits(save.load_file(again), dict(of)), layer
        assert torch.equal(QuantizedWeight.from_state_dict(save.load_file(again)).dequantize(), weight.dequantize())


def test_bitsandbytes_reads_it_back(bnb):
    W = torch.randn(6, 128)
    weight = lk.quantize(W, "nf4", nested=True)
    state = weight.state_dict()
    data = state.pop("weight")
    param = bnb.nn.Params4bit.from_prequantized(data, state, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(param.data, param.quant_state), weight.dequantize())


MADE = {
    "nf4": lambda: lk.quantize(torch.randn(6, 128), "nf4"),
    "fp4, odd": lambda: lk.quantize(torch.randn(5, 33), "fp4", group_size=32),
    "nested": lambda: lk.quantize(torch.randn(6, 128), "nf4", nested=True),
    "int8": lambda: lk.quantize(torch.randn(6, 128), "int8"),
    "int4": lambda: lk.quantize(torch.randn(8, 128), "int4"),
    "gptq": lambda: QuantizedWeight.from_gptq(**gptq(16, 32, 4, g_idx=G_IDX["act-order"][2].int())),
    "awq": lambda: QuantizedWeight.from_awq(**awq(16, 32, 4)),
}


@pytest.mark.parametrize("case", MADE)
def test_to(case):
    weight = MADE[case]()
    assert weight.to("cpu") is weight
    moved = weight.to("meta")
    assert moved.device.type == "meta"
    parts = [t for t in (*moved.packed, moved.order) if isinstance(t, torch.Tensor)]
    assert {t.device.type for t in parts} == {"meta"}
    assert len(parts) == sum(isinstance(t, torch.Tensor) for t in (*weight.packed, weight.order))
    assert (moved.fmt, moved.shape, moved.group_size, moved.dtype, moved.nbytes) == (
        weight.fmt, weight.shape, weight.group_size, weight.dtype, weight.nbytes,
    )  # fmt: skip
    here, there = weight.state_dict(), moved.state_dict()
    assert here.keys() == there.keys()
    for name, t in here.items():
        assert (t.dtype, t.shape) == (there[name].dtype, there[name].shape), name
        stays = "quant_state" in name or name == "weight_format"
        assert there[name].device.type == ("cpu" if stays else "meta"), name


def test_repr_and_bytes():
    weight = lk.quantize(torch.randn(6, 128), "nf4")
    assert weight.nbytes == 6 * 64 + 12 * 4 + 16 * 4
    assert repr(weight) == "QuantizedWeight(nf4, [6, 128], group_size=64, 0.646 bytes a number, cpu)"
    ordered = MADE["gptq"]()
    assert ordered.nbytes == 16 * 16 + 2 * 16 * 4 * 4 + 16 * 4 + 32 * 8
    assert "[0, 64]" in repr(lk.quantize(torch.empty(0, 64), "nf4"))


def test_no_format_of_its_own():
    weight = lk.quantize(torch.randn(3, 10), "int4", group_size=5)
    with pytest.raises(ValueError, match=r"int4 weight \[3, 10\] has no format"):
        weight.state_dict()


def test_bitsandbytes_is_not_imported():
    code = (
        "import sys, torch, lora_kernels as lk; w = lk.quantize(torch.randn(4, 64), 'nf4', nested=True);"
        "lk.QuantizedWeight.from_state_dict(w.state_dict()); assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
