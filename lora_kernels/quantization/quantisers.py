"""Quantisers: bitsandbytes' NF4, FP4 and int8 bit for bit, and int4 rounded to nearest in GPTQ's form."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops import _check
from ..reference.quantized import pack_codes
from . import bitsandbytes
from .fields import FLOATS, shape
from .gptq import Gptq
from .packing import WORD, words_of
from .tables import INT4
from .weight import QuantizedWeight

#: Numbers quantised at a time, so that what is in fp32 stays small beside the weight.
PANEL = 1 << 20
#: The block of absmax's absmax.
NESTED = 256
#: Below this bitsandbytes takes an absmax for this.
TINY = 1e-38
#: Magnitude codes of FP4 in order of value, and from where on bitsandbytes' CUDA kernel gives each but the first.
FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)
FP4_BOUNDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


def quantize(
    weight: Tensor,
    fmt: str,
    *,
    group_size: int | None = None,
    nested: bool = False,
    symmetric: bool = True,
) -> QuantizedWeight:
    """W packed: its numbers in 4 or 8 bits, each the nearest that its group's scale allows.

    - "nf4", "fp4": bitsandbytes' bits, in blocks of the flattened weight, W ≈ table[c] · absmax; its state dict's keys.
    - "int4": W ≈ s (c − z), c from 0 to 15. Symmetric: z = 8, s = 2 max|w| / 15. Otherwise z from 1 to 15 and s from
      the smallest and the largest of the group and 0. s is rounded to fp16 first. GPTQ's keys ("gptq"), where N and K
      are multiples of 8.
    - "int8": W ≈ c · max|w| / 127 by rows, as bitsandbytes' ``int8_vectorwise_quant`` rounds it, and its keys.

    bitsandbytes' CPU and CUDA builds differ in some bits: a CPU tensor gets the ones, a CUDA tensor the others.

    Args:
        weight: [N, K] fp32, bf16 or fp16, any strides.
        fmt: "nf4", "fp4", "int4" or "int8".
        group_size: how many numbers share a scale. nf4 and fp4: a power of two from 32 to 4096, 64 where None; int4: a
            divisor of K, 128 where None; int8: None, a row.
        nested: absmax in 8 bits too; nf4 and fp4.
        symmetric: int4 without zero points of its own.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, a NaN or an infinity in the weight.

    Sources: Dettmers et al., QLoRA (arXiv 2305.14314) and LLM.int8() (arXiv 2208.07339); Frantar et al., GPTQ
    (arXiv 2210.17323).
    """
    _check.tensor("weight", weight)
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got {shape(weight)}")
    if fmt not in _QUANTIZERS:
        raise ValueError(f"fmt must be one of {', '.join(_QUANTIZERS)}, got {fmt!r}")
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int)):
        raise TypeError(f"group_size must be an int or None, got {type(group_size).__name__}")
    if nested and fmt not in bitsandbytes.TABLES:
        raise ValueError(f"nested is for nf4 and fp4, got fmt {fmt!r}")
    if not symmetric and fmt != "int4":
        raise ValueError(f"symmetric=False is for int4, got fmt {fmt!r}")
    return _QUANTIZERS[fmt](weight.detach(), fmt, group_size, nested, symmetric)


def _blocks(weight: Tensor, fmt: str, group_size: int | None, nested: bool, symmetric: bool) -> QuantizedWeight:
    blocksize = 64 if group_size is None else group_size
    if blocksize not in bitsandbytes.BLOCKSIZES:
        raise ValueError(f"group_size must be one of {bitsandbytes.BLOCKSIZES} for {fmt}, got {group_size}")
    N, K = weight.shape
    rule = "cuda" if weight.is_cuda else "cpu"
    data = weight.new_empty((N * K + 1) // 2, 1, dtype=torch.uint8)
    absmax = weight.new_empty(math.ceil(N * K / blocksize), dtype=torch.float32)
    # Panels end with a block, and with a byte.
    for first, panel in _panels(weight, blocksize // math.gcd(K, blocksize)):
        flat, at = panel.reshape(-1), first * K
        c, block = _codes(flat, fmt, blocksize, rule)
        data[at // 2 :][: math.ceil(len(c) / 2), 0] = c[::2] << 4 | c[1::2]
        absmax[at // blocksize :][: len(block)] = block
    _finite(weight, absmax)
    state: dict[str, Any] = {
        "quant_type": fmt, "blocksize": blocksize, "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": (N, K),
    }  # fmt: skip
    tensors = {"weight": data, "weight.absmax": absmax}
    # -0 is not in bitsandbytes' map.
    tensors["weight.quant_map"] = torch.tensor(bitsandbytes.TABLES[fmt], device=weight.device) + 0.0
    if nested:
        offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
        tensors["weight.absmax"], tensors["weight.nested_absmax"] = _compressed(absmax - offset, rule)
        tensors["weight.nested_quant_map"] = dynamic_map().to(weight.device, copy=True)
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset.item()}
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return bitsandbytes.blocks({**tensors, bitsandbytes.KEY + fmt: packed})


def _panels(weight: Tensor, multiple: int) -> Iterator[tuple[int, Tensor]]:
    """Rows in fp32 and the number of the first, a multiple of ``multiple`` at a time."""
    N, K = weight.shape
    rows = max(PANEL // max(K, 1) // multiple, 1) * multiple
    for first in range(0, N if K else 0, rows):
        yield first, weight[first : first + rows].float()


def _codes(flat: Tensor, fmt: str, blocksize: int, rule: str) -> tuple[Tensor, Tensor]:
    """(codes uint8 of an even count, absmax of each block) of fp32 numbers.

    The CPU's: x / absmax lies in a bin between the middles of two values, with the upper end; an absmax of less than
    1e-38 counts as that, and what is left after the last whole block is divided instead of multiplied by an inverse.
    CUDA's: the inverse throughout, bounds of its own for FP4, and 0 times infinity is code 0.
    """
    whole = len(flat) - len(flat) % blocksize
    absmax = flat[:whole].view(-1, blocksize).abs().amax(dim=1)
    last = flat[whole:].abs().amax().view(1) if whole < len(flat) else flat[:0]
    if rule == "cpu":
        last = last.clamp(min=TINY)
        x = flat[:whole].view(-1, blocksize) * (1.0 / absmax.clamp(min=TINY))[:, None]
        x = torch.cat((x.flatten(), flat[whole:] / last if len(last) else last)).clamp_(-1, 1)
    else:
        x = flat[:whole].view(-1, blocksize) * (1.0 / absmax)[:, None]
        x = torch.cat((x.flatten(), flat[whole:] * (1.0 / last) if len(last) else last))
    x = torch.nn.functional.pad(x, (0, len(x) % 2))
    return _nearest(x, fmt, rule), torch.cat((absmax, last))


def _nearest(x: Tensor, fmt: str, rule: str) -> Tensor:
    """The code of each number from -1 to 1."""
    if rule == "cpu" or fmt == "nf4":
        value, order = torch.tensor(bitsandbytes.TABLES[fmt]).sort(stable=True)
        bounds = ((value[:-1] + value[1:]) / 2).to(x.device)
        c = torch.bucketize(x, bounds, out_int32=True)
        if rule == "cuda":
            c.masked_fill_(x.isnan(), 0)
        return order.to(x.device, torch.uint8)[c]
    magnitude = torch.bucketize(x.abs(), torch.tensor(FP4_BOUNDS, device=x.device), out_int32=True)
    magnitude.masked_fill_(x.isnan(), 0)
    return torch.tensor(FP4_CODES, dtype=torch.uint8, device=x.device)[magnitude] | (x < 0).to(torch.uint8) << 3


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic type, fp32 in order (Dettmers et al., arXiv 2110.02861).

    ± 10^(i - 6) · the middles of 2^i equal steps from 0.1 to 1, for i from 0 to 6; 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


@functools.cache
def _middles() -> tuple[Tensor, Tensor]:
    """(the middles of the map's neighbours, which of them each of the CPU's 65536 bins is past)."""
    values = dynamic_map()
    middles = (values[:-1] + values[1:]) * 0.5
    bins = (-1 + 2 * torch.arange(65536, dtype=torch.float64) / 65535).float()
    return middles, torch.bucketize(bins, middles).to(torch.uint8)


def _compressed(absmax: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """(codes of the dynamic map, absmax of each block of 256).

    The CPU's: the value nearest to the nearest of 65536 bins. CUDA's: the nearest value, between two the even code.
    """
    rows = torch.nn.functional.pad(absmax, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    top = rows.abs().amax(dim=1)
    x = (rows * (1.0 / top)[:, None]).clamp_(-1, 1).flatten()[: len(absmax)]
    middles, bins = (t.to(x.device) for t in _middles())
    if rule == "cpu":
        x = x.nan_to_num(nan=-1.0)
        return bins[((x + 1) * 0.5 * 65535 + 0.5).long()], top
    idx = torch.bucketize(x, middles)
    tie = (x == middles[idx.clamp(max=len(middles) - 1)]) & (idx % 2 == 1)
    return (idx + tie).masked_fill_(x.isnan(), 0).to(torch.uint8), top


def _groups(weight: Tensor, fmt: str, group_size: int | None, nested: bool, symmetric: bool) -> QuantizedWeight:
    N, K = weight.shape
    g = 128 if group_size is None else group_size
    if g < 1 or K % g:
        raise ValueError(f"group_size must be a positive divisor of K for int4, got {g} for weight {shape(weight)}")
    G = K // g
    codes = weight.new_empty(N, math.ceil(K / 2), dtype=torch.uint8)
    scales = weight.new_empty(N, G, dtype=torch.float16)
    zeros = weight.new_empty(N, G, dtype=torch.uint8)
    for first, panel in _panels(weight, 1):
        here = slice(first, first + len(panel))
        w = panel.view(-1, G, g)
        if symmetric:
            s = (w.abs().amax(dim=2) * (2 / 15)).half()
            z = torch.full_like(s, 8.0, dtype=torch.float32)
        else:
            low, high = (t.clamp_(*ends) for t, ends in ((w.amin(dim=2), (None, 0)), (w.amax(dim=2), (0, None))))
            s = torch.maximum((high - low) / 15, torch.maximum(high / 14, low / -15)).half()
            z = (-low / s.float()).nan_to_num_(0, 15, 0).round_().clamp_(1, 15)
        scales[here], zeros[here] = s, z.to(torch.uint8)
        c = (w / s.float()[:, :, None]).nan_to_num_(0).round_().add_(z[:, :, None]).clamp_(0, 15)
        codes[here] = pack_codes(c.flatten(1))
    _finite(weight, scales, " in fp16 at the scale of int4")
    origin = None
    if N % WORD == 0 and K % WORD == 0:
        g_idx = torch.arange(K, device=weight.device, dtype=torch.int32) // g
        origin = Gptq(words_of((zeros - 1).T), scales.T.contiguous(), g_idx)
    offsets = -scales.float() * zeros.float()
    return QuantizedWeight(
        "int4", codes, scales.float(), shape=(N, K), group_size=g, dtype=weight.dtype, offsets=offsets,
        table=torch.tensor(INT4, device=weight.device), origin=origin,
    )  # fmt: skip


def _rows(weight: Tensor, fmt: str, group_size: int | None, nested: bool, symmetric: bool) -> QuantizedWeight:
    if group_size is not None:
        raise ValueError(f"group_size must be None for int8, which has a scale for each row, got {group_size}")
    N, K = weight.shape
    CB = weight.new_empty(N, K, dtype=torch.int8)
    SCB = weight.new_zeros(N, dtype=torch.float32)
    for first, panel in _panels(weight, 1):
        here = slice(first, first + len(panel))
        SCB[here] = panel.abs().amax(dim=1)
        CB[here] = (panel * (127.0 / SCB[here])[:, None]).nan_to_num_(0).round_().to(torch.int8)
    _finite(weight, SCB)
    return bitsandbytes.rows(
        {"weight": CB, "SCB": SCB, "weight_format": torch.tensor(0, dtype=torch.uint8)}, dtype=weight.dtype
    )


def _finite(weight: Tensor, largest: Tensor, where: str = "") -> None:
    """The largest numbers of a weight's groups have a NaN or an infinity where the weight has one."""
    if not bool(largest.isfinite().all()):
        raise ValueError(f"weight {shape(weight)} must be finite{where}")


_QUANTIZERS = {"nf4": _blocks, "fp4": _blocks, "int4": _groups, "int8": _rows}
