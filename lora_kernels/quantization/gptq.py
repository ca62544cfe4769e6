"""GPTQ's weights in 4 bits, as AutoGPTQ and GPTQModel store them.

W[n, k] = scales[g, n] · (q[k, n] − z[g, n]) with g = g_idx[k]. ``qweight`` int32 [K / 8, N] holds q[8i + j, n] in bits
4j to 4j + 3 of row i, ``qzeros`` int32 [G, N / 8] z[g, 8c + j] in those of column c: less one in "gptq", as it is in
"gptq_v2".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.quantized import pack_codes, unpack_codes
from .fields import FLOATS, expect, finite, shape
from .packing import WORD, of_words, words_of
from .tables import INT4
from .weight import QuantizedWeight

FORMATS = ("gptq", "gptq_v2")
#: Groups smaller than this cost more than the codes.
SMALLEST = 8


@dataclass(frozen=True)
class Gptq:
    """What GPTQ stores beside the codes."""

    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx."""
        c = unpack_codes(weight.codes, weight.shape[1])
        if weight.order is not None:
            c = torch.empty_like(c).index_copy_(1, weight.order, c)
        of = {} if self.g_idx is None else {"g_idx": self.g_idx}
        return {"qweight": words_of(c).T.contiguous(), "qzeros": self.qzeros, "scales": self.scales, **of}

    def to(self, device: torch.device) -> Gptq:
        """The same on a device."""
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return replace(self, qzeros=self.qzeros.to(device), scales=self.scales.to(device), g_idx=g_idx)


def read(
    qweight: Any, qzeros: Any, scales: Any, g_idx: Any = None, checkpoint_format: str = "gptq", prefix: str = ""
) -> QuantizedWeight:
    """See :meth:`QuantizedWeight.from_gptq`."""
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format must be one of {FORMATS}, got {checkpoint_format!r}")
    expect(prefix + "scales", scales, FLOATS, ("G", "N"))
    G, N = scales.shape
    expect(prefix + "qweight", qweight, (torch.int32,), ("K / 8", N), f" for scales {shape(scales)}")
    if N % WORD:
        raise ValueError(f"{prefix}scales must have a multiple of {WORD} columns, got {shape(scales)}")
    expect(prefix + "qzeros", qzeros, (torch.int32,), (G, N // WORD), f" in 4 bits for scales {shape(scales)}")
    finite(prefix + "scales", scales)
    K = WORD * qweight.shape[0]
    z = of_words(qzeros) + (checkpoint_format == "gptq")
    group, order, of = _groups(g_idx, G, K, prefix)
    c = of_words(qweight.T)
    if order is not None:
        c = c[:, order]
    scale, zero = scales.float(), z.float()
    if of is not None:
        scale, zero = scale[of], zero[of]
    return QuantizedWeight(
        "int4", pack_codes(c), scale.T.contiguous(), shape=(N, K), group_size=group, dtype=scales.dtype,
        offsets=(-scale * zero).T.contiguous(), table=torch.tensor(INT4, device=qweight.device), order=order,
        origin=Gptq(qzeros, scales, g_idx),
    )  # fmt: skip


def _groups(g_idx: Any, G: int, K: int, prefix: str) -> tuple[int, Tensor | None, Tensor | None]:
    """(group_size, order, which of the G groups each of ours is); None: as they come."""
    if g_idx is None:
        if K % max(G, 1) or (K and not G):
            raise ValueError(f"{prefix}scales has {G} groups, which do not divide the {K} rows of qweight")
        return max(K // max(G, 1), 1), None, None
    name = prefix + "g_idx"
    expect(name, g_idx, (torch.int32, torch.int64), (K,), f" for qweight [{K // WORD}, N] in 4 bits")
    wrong = ((g_idx < -G) | (g_idx >= G)).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(f"{name}[{at}] is {int(g_idx[at])}, out of range for {G} groups")
    of = torch.where(g_idx < 0, g_idx + G, g_idx).long()
    counts = torch.bincount(of, minlength=G)
    group = math.gcd(*counts.tolist()) or 1
    if K and group < min(SMALLEST, int(counts.max())):
        raise ValueError(f"{name} has groups of {sorted(set(counts.tolist()))} columns, which no size divides")
    of, order = of.sort(stable=True)
    in_order = torch.equal(order, torch.arange(K, device=order.device))
    return group, None if in_order else order, of[::group]
