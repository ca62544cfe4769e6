"""AWQ's weights in 4 bits, in the layout that AutoAWQ calls "GEMM".

W[n, k] = scales[g, n] · (q[k, n] − z[g, n]) with g = k // group. ``qweight`` int32 [K, N / 8] holds
q[k, 8c + ORDER[i]] in bits 4i to 4i + 3 of column c; ``qzeros`` int32 [G, N / 8] holds z the same way, as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.quantized import pack_codes, unpack_codes
from .fields import FLOATS, expect, finite, shape
from .packing import WORD, of_words, words_of
from .tables import INT4
from .weight import QuantizedWeight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq:
    """What AWQ stores beside the codes."""

    qzeros: Tensor
    scales: Tensor

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """qweight, qzeros and scales."""
        c = unpack_codes(weight.codes, weight.shape[1]).T
        return {"qweight": words_of(_turned(c, ORDER)), "qzeros": self.qzeros, "scales": self.scales}

    def to(self, device: torch.device) -> Awq:
        """The same on a device."""
        return replace(self, qzeros=self.qzeros.to(device), scales=self.scales.to(device))


def _turned(c: Tensor, order: tuple[int, ...]) -> Tensor:
    """The columns of each eight in another order."""
    return c.unflatten(-1, (c.shape[-1] // WORD, WORD))[..., list(order)].flatten(-2)


def read(qweight: Any, qzeros: Any, scales: Any, prefix: str = "") -> QuantizedWeight:
    """See :meth:`QuantizedWeight.from_awq`."""
    expect(prefix + "scales", scales, FLOATS, ("G", "N"))
    G, N = scales.shape
    if N % WORD:
        raise ValueError(f"{prefix}scales must have a multiple of {WORD} columns, got {shape(scales)}")
    expect(prefix + "qweight", qweight, (torch.int32,), ("K", N // WORD), f" in 4 bits for scales {shape(scales)}")
    expect(prefix + "qzeros", qzeros, (torch.int32,), (G, N // WORD), f" in 4 bits for scales {shape(scales)}")
    finite(prefix + "scales", scales)
    K = qweight.shape[0]
    if K % max(G, 1) or (K and not G):
        raise ValueError(f"{prefix}scales has {G} groups, which do not divide the {K} rows of qweight")
    scale = scales.float()
    offsets = -scale * _turned(of_words(qzeros), INVERSE).float()
    return QuantizedWeight(
        "int4", pack_codes(_turned(of_words(qweight), INVERSE).T.contiguous()), scale.T.contiguous(), shape=(N, K),
        group_size=max(K // max(G, 1), 1), dtype=scales.dtype, offsets=offsets.T.contiguous(),
        table=torch.tensor(INT4, device=qweight.device), origin=Awq(qzeros, scales),
    )  # fmt: skip
