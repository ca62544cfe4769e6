"""bitsandbytes' weights: NF4 and FP4 in blocks, plain and nested, and int8 by rows; shared where they lie as packed.

4 bits: W is flattened row by row; two codes a byte, the first in the high half, and an absmax for every ``blocksize``
numbers, W = table[c] · absmax; a block may go over the end of a row. Nested: absmax is in 8 bits itself, in blocks of
``nested_blocksize``, absmax = map[i] · nested_absmax + offset. 8 bits: W = CB · SCB / 127, SCB the absmax of a row.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import _check
from ..reference.quantized import pack_codes, unpack_codes
from .fields import FLOATS, expect, finite, only, shape
from .tables import FP4, NF4
from .weight import QuantizedWeight

TABLES = {"nf4": NF4, "fp4": FP4}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
KEY = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Blocks:
    """How bitsandbytes stores the 4 bits."""

    storage: torch.dtype  # of the packed tensor, any that FSDP is given
    stored: torch.Size
    tail: int  # the half byte after an odd count of numbers
    statistics: dict[str, Tensor]  # all but the weight; without absmax where the scales are it
    key: str  # of the JSON among them

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight, weight.absmax, weight.quant_map and the rest, as ``Linear4bit`` saves them."""
        N, K = weight.shape
        data = weight.codes.reshape(1, -1)
        if K % 2:
            flat = unpack_codes(weight.codes, K).reshape(1, -1)
            if N % 2:
                flat = torch.cat((flat, flat.new_full((1, 1), self.tail)), dim=1)
            data = pack_codes(flat)
        absmax = {} if "weight.absmax" in self.statistics else {"weight.absmax": weight.scales.flatten()}
        return {"weight": data[0].view(self.storage).view(self.stored), **absmax, **self.statistics}

    def to(self, device: torch.device) -> Blocks:
        """The JSON stays, as bitsandbytes leaves it on the CPU."""
        moved = {name: t if name == self.key else t.to(device) for name, t in self.statistics.items()}
        return replace(self, statistics=moved)


@dataclass(frozen=True)
class Rows:
    """How bitsandbytes stores the 8 bits."""

    SCB: Tensor  # [N]
    weight_format: Tensor | None  # 0, by rows

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight, SCB and weight_format, as ``Linear8bitLt`` saves them."""
        of = {} if self.weight_format is None else {"weight_format": self.weight_format}
        return {"weight": weight.codes, "SCB": self.SCB, **of}

    def to(self, device: torch.device) -> Rows:
        """The format stays, as bitsandbytes leaves it on the CPU."""
        return replace(self, SCB=self.SCB.to(device))


def read(weight: Any, state: Any) -> QuantizedWeight:
    """See :meth:`QuantizedWeight.from_bitsandbytes`."""
    _check.tensor("weight", weight)
    if state is None:
        state = getattr(weight, "quant_state", None)
        state = getattr(weight, "SCB", None) if state is None else state
    if state is None:
        raise _without_state(weight)
    data = weight.data
    if isinstance(state, Tensor):
        return rows({"weight": data, "SCB": state, "weight_format": torch.tensor(0, dtype=torch.uint8)})
    if not hasattr(state, "as_dict"):
        raise TypeError(f"state must be a QuantState or the tensor SCB, got {type(state).__name__}")
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked_for_cpu(data, state)
    return blocks({"weight": data, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}})


def _without_state(weight: Tensor) -> Exception:
    if weight.dtype == torch.int8:
        return ValueError(f"weight {shape(weight)} in int8 has no SCB: its layer's state.SCB must be given as state")
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        return ValueError(
            f"weight {shape(weight)} in {weight.dtype} is not quantised yet: bitsandbytes does that when its layer is "
            "moved to a device"
        )
    return TypeError(f"weight must be Params4bit or Int8Params, or its state be given, got {type(weight).__name__}")


def _unpacked_for_cpu(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Out of the layout of bitsandbytes' CPU kernel; its inverse changes the state it is given, so that gets a copy."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    data, state = _convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    if not state.nested:  # the inverse leaves it in bf16 by columns
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


def blocks(tensors: Mapping[str, Tensor], prefix: str = "") -> QuantizedWeight:
    """Of ``Linear4bit``'s tensors by their keys, without its bias."""
    keys = [name for name in tensors if name.startswith(KEY)]
    if len(keys) != 1:
        raise ValueError(f"{prefix}{KEY}nf4 or fp4 must be there, one of them, got {keys or 'none'}")
    key = keys[0]
    state = _state(prefix + key, tensors[key])
    kind, blocksize, (N, K) = state["quant_type"], state["blocksize"], state["shape"]
    count = math.ceil(N * K / blocksize)
    names = ["weight", "weight.absmax", "weight.quant_map", key]
    if state["nested"]:
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    only(tensors, names, (), prefix, f"a {kind} weight")

    data, table = tensors["weight"], torch.tensor(TABLES[kind])
    _check.tensor(prefix + "weight", data)
    if data.nbytes != (N * K + 1) // 2:
        raise ValueError(
            f"{prefix}weight must hold {(N * K + 1) // 2} bytes for [{N}, {K}], got {data.nbytes}: {shape(data)} in "
            f"{data.dtype}"
        )
    quant_map = tensors["weight.quant_map"]
    expect(prefix + "weight.quant_map", quant_map, FLOATS, (16,))
    if _check.readable(quant_map) and not torch.allclose(quant_map.float().cpu(), table, atol=2**-8):
        raise ValueError(f"{prefix}weight.quant_map must be {kind}'s values, got {quant_map.tolist()}")
    absmax = tensors["weight.absmax"]
    why = f" for [{N}, {K}] in blocks of {blocksize}"
    expect(prefix + "weight.absmax", absmax, (torch.uint8,) if state["nested"] else FLOATS, (count,), why)
    plain = K % blocksize == 0 and absmax.dtype == torch.float32
    if state["nested"]:
        absmax = _nested(tensors, state, prefix)
    else:
        finite(prefix + "weight.absmax", absmax)

    flat = data.reshape(-1).view(torch.uint8)
    origin = Blocks(
        data.dtype, data.shape, int(flat[-1]) & 15 if N * K % 2 and not flat.is_meta else 0,
        {name: tensors[name] for name in names[2 if plain else 1 :]}, key,
    )  # fmt: skip
    codes = pack_codes(unpack_codes(flat[None], N * K).view(N, K)) if K % 2 else flat.view(N, K // 2)
    g, scales = math.gcd(K, blocksize), absmax.float()
    if g != blocksize:  # a row ends within a block
        first = torch.arange(N * K // g, device=scales.device) * g
        scales = scales[first // blocksize]
    return QuantizedWeight(
        kind, codes, scales.view(N, K // g), shape=(N, K), group_size=g, dtype=state["dtype"],
        table=table.to(data.device), origin=origin,
    )  # fmt: skip


def _state(name: str, packed: Tensor) -> dict[str, Any]:
    """The JSON of a QuantState, each entry checked."""
    expect(name, packed, (torch.uint8,), ("bytes",))
    try:
        state = json.loads(bytes(packed.tolist()))
        N, K = state["shape"]
        wanted: dict[str, Any] = {"quant_type": name.rpartition("__")[2], "blocksize": int(state["blocksize"])}
        wanted |= {"shape": (N, K), "dtype": getattr(torch, state["dtype"], None)}
        wanted["nested"] = "nested_blocksize" in state
        if wanted["nested"]:
            wanted["nested_blocksize"] = int(state["nested_blocksize"])
            wanted["nested_offset"] = float(state["nested_offset"])
            wanted["nested_dtype"] = getattr(torch, state["nested_dtype"], None)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} must be the JSON of a QuantState of a matrix: {error!r}") from error
    if state.get("quant_type") not in TABLES or state["quant_type"] != wanted["quant_type"]:
        raise ValueError(f"{name}: quant_type must be nf4 or fp4 as the key says, got {state.get('quant_type')!r}")
    if wanted["blocksize"] not in BLOCKSIZES:
        raise ValueError(f"{name}: blocksize must be one of {BLOCKSIZES}, got {state['blocksize']}")
    if any(not isinstance(n, int) or n < 0 for n in (N, K)):
        raise ValueError(f"{name}: shape must be [N, K], got {state['shape']}")
    for entry in ("dtype", "nested_dtype"):
        if entry in wanted and wanted[entry] not in FLOATS:
            raise ValueError(f"{name}: {entry} must be float32, bfloat16 or float16, got {state[entry]!r}")
    if wanted["nested"] and wanted["nested_blocksize"] < 1:
        raise ValueError(f"{name}: nested_blocksize must be positive, got {state['nested_blocksize']}")
    if wanted["nested"] and N * K and not math.isfinite(wanted["nested_offset"]):
        raise ValueError(f"{name}: nested_offset must be finite, got {state['nested_offset']}")
    return wanted


def _nested(tensors: Mapping[str, Tensor], state: dict[str, Any], prefix: str) -> Tensor:
    """absmax [blocks]; the product and the sum are rounded each."""
    idx, of = tensors["weight.absmax"], tensors["weight.nested_quant_map"]
    absmax, size = tensors["weight.nested_absmax"], state["nested_blocksize"]
    expect(prefix + "weight.nested_quant_map", of, (torch.float32,), (256,))
    why = f" for {len(idx)} blocks by {size}"
    expect(prefix + "weight.nested_absmax", absmax, (torch.float32,), (math.ceil(len(idx) / size),), why)
    finite(prefix + "weight.nested_quant_map", of)
    finite(prefix + "weight.nested_absmax", absmax)
    block = torch.arange(len(idx), device=idx.device) // size
    return (of[idx.long()] * absmax[block]).to(state["nested_dtype"]) + state["nested_offset"]


def rows(tensors: Mapping[str, Tensor], prefix: str = "", dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """Of ``Linear8bitLt``'s tensors by their keys, without its bias."""
    only(tensors, ("weight", "SCB"), ("weight_format",), prefix, "an int8 weight")
    codes, SCB, kind = tensors["weight"], tensors["SCB"], tensors.get("weight_format")
    expect(prefix + "weight", codes, (torch.int8,), ("N", "K"))
    N, K = codes.shape
    expect(prefix + "SCB", SCB, FLOATS, (N,), f" for weight {shape(codes)}")
    finite(prefix + "SCB", SCB)
    if kind is not None and (not isinstance(kind, Tensor) or kind.numel() != 1 or int(kind) != 0):
        raise ValueError(f"{prefix}weight_format must be 0, by rows, got {kind}")
    scales = (SCB.float() / 127).view(N, 1)
    return QuantizedWeight(
        "int8", codes.contiguous(), scales if K else scales[:, :0], shape=(N, K), group_size=max(K, 1), dtype=dtype,
        origin=Rows(SCB, kind),
    )  # fmt: skip
