"""What is no weight of the format it claims to be is refused, by name, shape and what was expected."""

import json

import pytest
import torch
from quantized_formats import awq, gptq

import lora_kernels as lk
from lora_kernels import QuantizedWeight

NF4 = "weight.quant_state.bitsandbytes__nf4"


def blocks(nested=False, fmt="nf4", N=6, K=96):
    return lk.quantize(torch.randn(N, K), fmt, nested=nested).state_dict()


def rows():
    return lk.quantize(torch.randn(5, 33), "int8").state_dict()


def with_state(tensors, **changes):
    """The JSON with other entries; None leaves one out."""
    state = json.loads(bytes(tensors[NF4].tolist())) | changes
    text = json.dumps({name: value for name, value in state.items() if value is not None})
    return tensors | {NF4: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def without(tensors, *names):
    return {name: t for name, t in tensors.items() if name not in names}


def poked(t, value, at=1):
    t = t.clone()
    t.view(-1)[at] = value
    return t


def narrowed(tensors, name, dim=0):
    return tensors | {name: tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1)}


def changed(tensors, **changes):
    return {**tensors, **changes}


NAN, INF = float("nan"), float("inf")
#: What is wrong: the tensors, the error, and what its message must hold, a regular expression.
FAULTS = {
    # bitsandbytes, 4 bits
    "weight truncated": (
        lambda: narrowed(blocks(), "weight"),
        ValueError,
        r"a\.weight must hold 288 bytes for \[6, 96\], got 287: \[287, 1\] in torch.uint8",
    ),
    "weight of more": (
        lambda: blocks() | {"weight": torch.zeros(289, 1, dtype=torch.uint8)},
        ValueError,
        r"a\.weight must hold 288 bytes",
    ),
    "weight missing": (lambda: without(blocks(), "weight"), ValueError, r"a nf4 weight lacks a\.weight$"),
    "weight not packed": (
        lambda: blocks() | {"weight": torch.zeros(6, 96)},
        ValueError,
        r"a\.weight must hold 288 bytes.*got 2304: \[6, 96\] in torch.float32",
    ),
    "weight no tensor": (lambda: blocks() | {"weight": [1]}, TypeError, r"a\.weight must be a tensor, got list"),
    "absmax missing": (lambda: without(blocks(), "weight.absmax"), ValueError, r"lacks a\.weight\.absmax"),
    "absmax short": (
        lambda: narrowed(blocks(), "weight.absmax"),
        ValueError,
        r"a\.weight\.absmax must be \[9\] for \[6, 96\] in blocks of 64, got \[8\]",
    ),
    "absmax of another type": (
        lambda: blocks() | {"weight.absmax": torch.zeros(9, dtype=torch.int32)},
        TypeError,
        r"a\.weight\.absmax \[9\] must be float32 or bfloat16 or float16, got torch.int32",
    ),
    "absmax NaN": (
        lambda: blocks() | {"weight.absmax": poked(torch.ones(9), NAN)},
        ValueError,
        r"a\.weight\.absmax \[9\] must be finite, got nan at \[1\]",
    ),
    "absmax infinite": (
        lambda: blocks() | {"weight.absmax": poked(torch.ones(9).half(), -INF)},
        ValueError,
        r"absmax \[9\] must be finite, got -inf at \[1\]",
    ),
    "map missing": (lambda: without(blocks(), "weight.quant_map"), ValueError, r"lacks a\.weight\.quant_map"),
    "map short": (
        lambda: narrowed(blocks(), "weight.quant_map"),
        ValueError,
        r"a\.weight\.quant_map must be \[16\], got \[15\]",
    ),
    "map of another type": (
        lambda: blocks() | {"weight.quant_map": blocks(fmt="fp4")["weight.quant_map"]},
        ValueError,
        r"a\.weight\.quant_map must be nf4's values",
    ),
    "map NaN": (
        lambda: blocks() | {"weight.quant_map": poked(blocks()["weight.quant_map"], NAN)},
        ValueError,
        r"a\.weight\.quant_map must be",
    ),
    "state missing": (
        lambda: without(blocks(), NF4),
        ValueError,
        r"a\.weight\.quant_state\.bitsandbytes__nf4 or fp4 must be there",
    ),
    "state twice": (lambda: blocks() | blocks(fmt="fp4"), ValueError, r"one of them, got"),
    "state of another type": (
        lambda: blocks() | {NF4: torch.zeros(3)},
        TypeError,
        r"a\.weight\.quant_state\.bitsandbytes__nf4 \[3\] must be uint8",
    ),
    "state not JSON": (
        lambda: blocks() | {NF4: torch.zeros(3, dtype=torch.uint8)},
        ValueError,
        r"bitsandbytes__nf4 must be the JSON",
    ),
    "state truncated": (lambda: narrowed(blocks(), NF4), ValueError, r"bitsandbytes__nf4 must be the JSON"),
    "state a list": (
        lambda: blocks() | {NF4: torch.tensor(list(b"[]"), dtype=torch.uint8)},
        ValueError,
        r"bitsandbytes__nf4 must be the JSON",
    ),
    "unknown type": (
        lambda: with_state(blocks(), quant_type="af4"),
        ValueError,
        r"quant_type must be nf4 or fp4 as the key says, got 'af4'",
    ),
    "type unlike key": (lambda: with_state(blocks(), quant_type="fp4"), ValueError, r"as the key says, got 'fp4'"),
    "unknown key": (
        lambda: {name.replace("nf4", "af4"): t for name, t in blocks().items()},
        ValueError,
        r"quant_type must be nf4 or fp4",
    ),
    "blocksize wrong": (lambda: with_state(blocks(), blocksize=48), ValueError, r"blocksize must be one of .*got 48"),
    "blocksize of another": (
        lambda: with_state(blocks(), blocksize=128),
        ValueError,
        r"a\.weight\.absmax must be \[5\] for \[6, 96\] in blocks of 128, got \[9\]",
    ),
    "blocksize missing": (lambda: with_state(blocks(), blocksize=None), ValueError, r"KeyError\('blocksize'\)"),
    "shape of three": (lambda: with_state(blocks(), shape=[6, 8, 12]), ValueError, r"of a matrix"),
    "shape negative": (
        lambda: with_state(blocks(), shape=[-6, -96]),
        ValueError,
        r"shape must be \[N, K\], got \[-6, -96\]",
    ),
    "shape no integers": (
        lambda: with_state(blocks(), shape=[6.0, 96.0]),
        ValueError,
        r"shape must be \[N, K\], got \[6\.0, 96\.0\]",
    ),
    "dtype unknown": (
        lambda: with_state(blocks(), dtype="int7"),
        ValueError,
        r"dtype must be float32, bfloat16 or float16, got 'int7'",
    ),
    "extra": (lambda: blocks() | {"weight.g": torch.zeros(1)}, ValueError, r"a nf4 weight has no a\.weight\.g$"),
    "extra beside": (lambda: blocks() | {"qzeros": torch.zeros(1)}, ValueError, r"has no a\.qzeros$"),
    "nested_absmax missing": (
        lambda: without(blocks(True), "weight.nested_absmax"),
        ValueError,
        r"lacks a\.weight\.nested_absmax",
    ),
    "nested_absmax short": (
        lambda: narrowed(blocks(True), "weight.nested_absmax"),
        ValueError,
        r"a\.weight\.nested_absmax must be \[1\] for 9 blocks by 256, got \[0\]",
    ),
    "nested_absmax NaN": (
        lambda: blocks(True) | {"weight.nested_absmax": torch.tensor([NAN])},
        ValueError,
        r"a\.weight\.nested_absmax \[1\] must be finite",
    ),
    "nested map short": (
        lambda: narrowed(blocks(True), "weight.nested_quant_map"),
        ValueError,
        r"a\.weight\.nested_quant_map must be \[256\], got \[255\]",
    ),
    "nested map NaN": (
        lambda: blocks(True) | {"weight.nested_quant_map": torch.full((256,), NAN)},
        ValueError,
        r"nested_quant_map \[256\] must be finite",
    ),
    "nested tensors, plain state": (
        lambda: blocks(True) | {NF4: blocks()[NF4]},
        ValueError,
        r"has no a\.weight\.nested_",
    ),
    "plain tensors, nested state": (
        lambda: blocks() | {NF4: blocks(True)[NF4]},
        ValueError,
        r"lacks a\.weight\.nested_absmax, a\.weight\.nested_quant_map",
    ),
    "nested absmax not packed": (
        lambda: blocks(True) | {"weight.absmax": torch.ones(9)},
        TypeError,
        r"a\.weight\.absmax \[9\] must be uint8, got torch.float32",
    ),
    "offset NaN": (lambda: with_state(blocks(True), nested_offset=NAN), ValueError, r"nested_offset must be finite"),
    "offset missing": (
        lambda: with_state(blocks(True), nested_offset=None),
        ValueError,
        r"KeyError\('nested_offset'\)",
    ),
    "nested blocksize 0": (
        lambda: with_state(blocks(True), nested_blocksize=0),
        ValueError,
        r"nested_blocksize must be positive, got 0",
    ),
    "nested dtype": (lambda: with_state(blocks(True), nested_dtype="int8"), ValueError, r"nested_dtype must be"),
    # bitsandbytes, 8 bits
    "SCB short": (lambda: narrowed(rows(), "SCB"), ValueError, r"a\.SCB must be \[5\] for weight \[5, 33\], got \[4\]"),
    "SCB infinite": (
        lambda: rows() | {"SCB": poked(torch.ones(5), INF)},
        ValueError,
        r"a\.SCB \[5\] must be finite, got inf at \[1\]",
    ),
    "SCB of another type": (
        lambda: rows() | {"SCB": torch.ones(5, dtype=torch.int8)},
        TypeError,
        r"a\.SCB \[5\] must be float32",
    ),
    "weight not int8": (
        lambda: rows() | {"weight": torch.ones(5, 33)},
        TypeError,
        r"a\.weight \[5, 33\] must be int8, got torch.float32",
    ),
    "weight no matrix": (
        lambda: rows() | {"weight": torch.ones(5, dtype=torch.int8)},
        ValueError,
        r"a\.weight must be \[N, K\], got \[5\]",
    ),
    "by columns": (
        lambda: rows() | {"weight_format": torch.tensor(1, dtype=torch.uint8)},
        ValueError,
        r"a\.weight_format must be 0, by rows, got 1",
    ),
    "int8 missing": (lambda: without(rows(), "weight"), ValueError, r"an int8 weight lacks a\.weight"),
    "int8 extra": (lambda: rows() | {"CB": torch.zeros(1)}, ValueError, r"an int8 weight has no a\.CB"),
    # GPTQ
    "qzeros missing": (lambda: without(gptq(16, 32, 4), "qzeros"), ValueError, r"lacks a\.qzeros"),
    "scales missing": (lambda: without(gptq(16, 32, 4), "scales"), ValueError, r"lacks a\.scales"),
    "gptq extra": (lambda: gptq(16, 32, 4) | {"perm": torch.zeros(1)}, ValueError, r"has no a\.perm"),
    "scales NaN": (
        lambda: changed(gptq(16, 32, 4), scales=poked(torch.ones(4, 16).half(), NAN, 17)),
        ValueError,
        r"a\.scales \[4, 16\] must be finite, got nan at \[1, 1\]",
    ),
    "scales of another type": (
        lambda: changed(gptq(16, 32, 4), scales=torch.ones(4, 16).int()),
        TypeError,
        r"a\.scales \[4, 16\] must be float32",
    ),
    "scales no matrix": (
        lambda: changed(gptq(16, 32, 4), scales=torch.ones(16)),
        ValueError,
        r"a\.scales must be \[rows, columns\], got \[16\]",
    ),
    "qweight of another type": (
        lambda: changed(gptq(16, 32, 4), qweight=torch.ones(4, 16)),
        TypeError,
        r"a\.qweight \[4, 16\] must be int32, got torch.float32",
    ),
    "qweight narrow": (
        lambda: narrowed(gptq(16, 32, 4), "qweight", 1),
        ValueError,
        r"a\.qweight \[4, 15\] must have as many columns as scales \[4, 16\] \(GPTQ\), or an eighth",
    ),
    "qweight truncated": (
        lambda: narrowed(gptq(16, 32, 4, g_idx=torch.arange(32).int() // 8), "qweight"),
        ValueError,
        r"a\.g_idx must be \[24\] for qweight \[3, N\] in 4 bits, got \[32\]",
    ),
    "qzeros truncated": (
        lambda: narrowed(gptq(16, 32, 4), "qzeros"),
        ValueError,
        r"a\.qzeros must be \[4, 2\] in 4 bits for scales \[4, 16\], got \[3, 2\]",
    ),
    "of 8 bits": (
        lambda: changed(gptq(16, 32, 4), qzeros=torch.zeros(4, 4).int()),
        ValueError,
        r"a\.qzeros must be \[4, 2\] in 4 bits",
    ),
    "qzeros of another type": (
        lambda: changed(gptq(16, 32, 4), qzeros=torch.zeros(4, 2).long()),
        TypeError,
        r"a\.qzeros \[4, 2\] must be int32, got torch.int64",
    ),
    "groups that do not divide": (
        lambda: gptq(16, 40, 3),
        ValueError,
        r"a\.scales has 3 groups, which do not divide the 40 rows",
    ),
    "no groups": (
        lambda: changed(gptq(16, 32, 4), scales=torch.ones(0, 16), qzeros=torch.zeros(0, 2).int()),
        ValueError,
        r"a\.scales has 0 groups",
    ),
    "g_idx too large": (
        lambda: gptq(16, 32, 4, g_idx=poked(torch.arange(32).int() // 8, 4, 3)),
        ValueError,
        r"a\.g_idx\[3\] is 4, out of range for 4 groups",
    ),
    "g_idx too small": (
        lambda: gptq(16, 32, 4, g_idx=poked(torch.arange(32).int() // 8, -5, 3)),
        ValueError,
        r"a\.g_idx\[3\] is -5, out of range for 4 groups",
    ),
    "g_idx short": (lambda: gptq(16, 32, 4, g_idx=torch.zeros(31).int()), ValueError, r"a\.g_idx must be \[32\]"),
    "g_idx of another type": (
        lambda: gptq(16, 32, 4, g_idx=torch.zeros(32)),
        TypeError,
        r"a\.g_idx \[32\] must be int32 or int64, got torch.float32",
    ),
    "g_idx irregular": (
        lambda: gptq(16, 32, 2, g_idx=(torch.arange(32) > 12).int()),
        ValueError,
        r"a\.g_idx has groups of \[13, 19\] columns",
    ),
    "columns not of words": (
        lambda: {"qweight": torch.zeros(4, 12).int(), "qzeros": torch.zeros(4, 1).int(), "scales": torch.ones(4, 12)},
        ValueError,
        r"a\.scales must have a multiple of 8 columns, got \[4, 12\]",
    ),
    # AWQ
    "awq with g_idx": (
        lambda: awq(16, 32, 4) | {"g_idx": torch.zeros(32).int()},
        ValueError,
        r"an AWQ weight has no a\.g_idx",
    ),
    "awq qweight truncated": (
        lambda: narrowed(awq(16, 32, 4), "qweight"),
        ValueError,
        r"a\.scales has 4 groups, which do not divide the 31 rows",
    ),
    "awq qzeros truncated": (
        lambda: narrowed(awq(16, 32, 4), "qzeros", 1),
        ValueError,
        r"a\.qzeros must be \[4, 2\] in 4 bits",
    ),
    "awq scales infinite": (
        lambda: changed(awq(16, 32, 4), scales=poked(torch.ones(4, 16), INF)),
        ValueError,
        r"a\.scales \[4, 16\] must be finite",
    ),
    "awq qweight of another type": (
        lambda: changed(awq(16, 32, 4), qweight=torch.zeros(32, 2)),
        TypeError,
        r"a\.qweight \[32, 2\] must be int32",
    ),
    # neither
    "plain weight": (
        lambda: {"weight": torch.ones(5, 33)},
        ValueError,
        r"'a\.' has no tensors of bitsandbytes, GPTQ or AWQ: weight of 1 tensors",
    ),
    "nothing": (lambda: {"lora_A.weight": torch.ones(5, 33)}, ValueError, r"'a\.' has no tensors of .*: none of 1"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_tensors(case):
    make, error, message = FAULTS[case]
    with pytest.raises(error, match=message):
        QuantizedWeight.from_state_dict({f"a.{name}": t for name, t in make().items()}, "a.")


@pytest.mark.parametrize("read", (QuantizedWeight.from_gptq, QuantizedWeight.from_awq))
def test_no_tensors(read):
    with pytest.raises(TypeError, match="scales must be a tensor, got NoneType"):
        read(torch.zeros(4, 16, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32), None)
    with pytest.raises(ValueError, match=r"qweight must be \["):
        read(torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 16))


@pytest.mark.parametrize("read", (QuantizedWeight.from_gptq, QuantizedWeight.from_state_dict))
def test_checkpoint_format(read):
    tensors = gptq(16, 32, 4)
    with pytest.raises(ValueError, match=r"checkpoint_format must be one of .*, got 'awq'"):
        read(**tensors, checkpoint_format="awq") if read == QuantizedWeight.from_gptq else read(
            tensors, checkpoint_format="awq"
        )


def test_parameters():
    bnb = pytest.importorskip("bitsandbytes")
    W = torch.randn(4, 64)
    read = QuantizedWeight.from_bitsandbytes
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        read([1.0])
    for plain in (W, torch.nn.Parameter(W)):
        with pytest.raises(TypeError, match="weight must be Params4bit or Int8Params, or its state be given, got"):
            read(plain)
    for raw in (bnb.nn.Params4bit(W), bnb.nn.Int8Params(W, requires_grad=False)):
        with pytest.raises(ValueError, match=r"weight \[4, 64\] in torch.float32 is not quantised yet"):
            read(raw)
    data, state = bnb.functional.quantize_4bit(W, quant_type="nf4")
    with pytest.raises(TypeError, match="state must be a QuantState or the tensor SCB, got dict"):
        read(data, {"absmax": state.absmax})
    with pytest.raises(ValueError, match=r"weight must hold 128 bytes for \[4, 64\], got 127"):
        read(data[1:], state)
    with pytest.raises(TypeError, match=r"weight \[128, 1\] must be int8, got torch.uint8"):
        read(data, torch.ones(128))
    state.quant_type = "int4"
    with pytest.raises(ValueError, match="quant_type must be nf4 or fp4 as the key says, got 'int4'"):
        read(data, state)
    state.quant_type, state.shape = "nf4", torch.Size((4, 4, 16))
    with pytest.raises(ValueError, match="must be the JSON of a QuantState of a matrix"):
        read(data, state)
