"""An adapter merged into a packed weight, and what rounding left of it."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import _check
from ..ops._quantized import dequantize_
from .awq import ORDER, Awq, _turned
from .bitsandbytes import Blocks
from .fields import finite
from .gptq import Gptq
from .packing import of_words, words_of
from .quantisers import _QUANTIZERS, PANEL
from .weight import Origin, QuantizedWeight

#: The cosine below which a merge warns.
FAITHFUL = 0.9


class MergeWarning(UserWarning):
    """Merging lost much of an adapter."""


@dataclass(frozen=True)
class MergeReport:
    """What is left of δ = s B A as Δ = Q' - W, both unpacked.

    Attributes:
        codes_changed: the share of the codes that are not what they were.
        scales_changed: how many scales are not what they were.
        cosine: of the angle between Δ and δ; 1: the same direction, 0: nothing of δ is there.
        lost: ‖Δ - δ‖ / ‖δ‖; 0: nothing.
    """

    codes_changed: float
    scales_changed: int
    cosine: float
    lost: float


def merge_requant(
    weight: QuantizedWeight, A: Tensor, B: Tensor, scaling: float = 1.0
) -> tuple[QuantizedWeight, MergeReport]:
    """Q' = quantise(W + s B A) in W's own format and group size, and what that left of the adapter.

    Rounding to 4 bits is coarser than most adapters: a change of less than half the distance of two codes vanishes. So
    look at the report, and keep an adapter that matters beside its base: :func:`lora_kernels.quantized_lora_linear`
    loses nothing. Numbers go to the nearest code, also in formats whose own quantisers weigh them by data (GPTQ, AWQ).
    W is unpacked some rows at a time. An adapter that is zero leaves the weight as it is.

    Args:
        weight: W, packed, of shape (N, K); left as it is.
        A, B: [R, K] and [N, R], fp32, bf16 or fp16, on the weight's device.
        scaling: s, a float.

    Returns:
        The packed weight and a :class:`MergeReport`.

    Warns:
        MergeWarning: the cosine is below 0.9.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a NaN or an infinity in A or B.

    Source: what PEFT's ``Linear4bit.merge`` does (Dettmers et al., QLoRA, arXiv 2305.14314), in fp32.
    """
    _checked(weight, A, B, scaling)
    if not (scaling and bool(A.any()) and bool(B.any())):
        return weight, MergeReport(codes_changed=0.0, scales_changed=0, cosine=1.0, lost=0.0)
    A = A.detach().float()
    total = _Sum(weight, A if weight.order is None else A[:, weight.order], B.detach(), float(scaling))
    merged = _quantized(total)
    report = _report(total, merged)
    if report.cosine < FAITHFUL:
        warnings.warn(
            f"merging this adapter into its {weight.fmt} weight loses {report.lost:.0%} of it (cosine "
            f"{report.cosine:.2f}), since rounding is coarser than the adapter; unmerged, in quantized_lora_linear, "
            "nothing is lost",
            MergeWarning,
            stacklevel=2,
        )
    return merged, report


class _Sum:
    """W + s B A as the quantisers read a weight, some rows in fp32 at a time; its columns as the codes have them."""

    def __init__(self, weight: QuantizedWeight, A: Tensor, B: Tensor, scaling: float):
        self.weight, self.A, self.B, self.scaling = weight, A, B, scaling
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.is_cuda, self.new_empty, self.new_zeros = A.is_cuda, A.new_empty, A.new_zeros

    def __getitem__(self, rows: slice) -> Tensor:
        return unpacked_rows(self.weight, rows).add_(self.delta(rows))

    def delta(self, rows: slice) -> Tensor:
        """s B A of these rows."""
        return (self.scaling * self.B[rows].float()) @ self.A


def unpacked_rows(weight: QuantizedWeight, rows: slice) -> Tensor:
    """Rows of W in fp32, its columns as the codes have them."""
    start, stop, _ = rows.indices(weight.shape[0])
    out = weight.scales.new_empty(stop - start, weight.shape[1])
    dequantize_(out, *weight.packed, start, 0)
    return out


def _quantized(total: Any) -> QuantizedWeight:
    """In the format that the weight has, down to the tensors that only its origin stores."""
    weight = total.weight
    group, nested, origin = weight.group_size, False, weight.origin
    if weight.fmt == "int8":
        group = None
    if isinstance(origin, Blocks):
        state = json.loads(bytes(origin.statistics[origin.key].tolist()))
        group, nested = state["blocksize"], "nested_blocksize" in state
    symmetric = weight.offsets is not None and torch.equal(weight.offsets, -8 * weight.scales)
    new = _QUANTIZERS[weight.fmt](total, weight.fmt, group, nested, symmetric)
    new_origin: Origin | None = new.origin
    if isinstance(origin, Blocks) and isinstance(new_origin, Blocks):
        new_origin = replace(new_origin, storage=origin.storage, stored=origin.stored)
    elif isinstance(new_origin, Gptq):
        new_origin = _in_4_bits(weight, new_origin)
    return QuantizedWeight(
        new.fmt, new.codes, new.scales, shape=(weight.shape[0], weight.shape[1]), group_size=new.group_size,
        dtype=weight.dtype, offsets=new.offsets, table=new.table, order=weight.order, origin=new_origin,
    )  # fmt: skip


def _in_4_bits(weight: QuantizedWeight, new: Gptq) -> Origin:
    """``new`` as AWQ stores it, or GPTQ with the order and the zeros that the weight's own tensors have."""
    z = of_words(new.qzeros) + 1  # [G, N]
    if isinstance(weight.origin, Awq):
        return Awq(words_of(_turned(z, ORDER)), new.scales)
    g_idx, old = new.g_idx, weight.origin
    if weight.order is not None and g_idx is not None:
        g_idx = torch.empty_like(g_idx).index_copy_(0, weight.order, g_idx)
    if isinstance(old, Gptq) and weight.offsets is not None:
        group = 0 if old.g_idx is None else int(old.g_idx.remainder(len(old.scales)).min())
        stored, zeros = of_words(old.qzeros)[group], (-weight.offsets[:, 0] / weight.scales[:, 0]).round()
        if bool((stored == zeros).any()):  # as they are: "gptq_v2"
            return replace(new, qzeros=words_of(z), g_idx=g_idx)
    return replace(new, g_idx=g_idx)


def _report(total: _Sum, merged: QuantizedWeight) -> MergeReport:
    weight, (N, K) = total.weight, total.weight.shape
    step = max(1, PANEL // 4 // max(K, 1))
    norms = torch.zeros(4, dtype=torch.float64)  # ‖Δ‖², ‖δ‖², Δ·δ, ‖Δ - δ‖²
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        delta = total.delta(rows).double()
        change = unpacked_rows(merged, rows).double() - unpacked_rows(weight, rows)
        lost = change - delta
        for i, (a, b) in enumerate(((change, change), (delta, delta), (change, delta), (lost, lost))):
            norms[i] += float((a * b).sum())
    change_sq, delta_sq, both, lost_sq = norms.tolist()
    if weight.codes.dtype == torch.int8:
        changed = int((weight.codes != merged.codes).sum())
    else:
        differ = weight.codes ^ merged.codes
        changed = sum(int((differ & half).ne(0).sum()) for half in (0xF0, 0x0F))
    return MergeReport(
        codes_changed=changed / max(N * K, 1),
        scales_changed=int((weight.scales != merged.scales).sum()),
        cosine=both / math.sqrt(change_sq * delta_sq) if change_sq and delta_sq else 0.0,
        lost=math.sqrt(lost_sq / delta_sq) if delta_sq else math.inf,
    )


def _checked(weight: QuantizedWeight, A: Tensor, B: Tensor, scaling: float) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight must be a QuantizedWeight, got {type(weight).__name__}")
    N, K = weight.shape
    for name, factor in (("A", A), ("B", B)):
        _check.floating(name, factor)
        if factor.device != weight.device:
            raise ValueError(f"{name} is on {factor.device}, weight on {weight.device}")
    if A.dim() != 2 or A.shape[1] != K:
        raise ValueError(f"A must be [R, {K}] for a weight of shape ({N}, {K}), got {_check.shape(A)}")
    if B.shape != (N, A.shape[0]):
        raise ValueError(f"B must be [{N}, {A.shape[0]}] for the weight and A, got {_check.shape(B)}")
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a float, got {type(scaling).__name__}")
    for name, factor in (("A", A), ("B", B)):
        finite(name, factor)
