"""The calls of ``quantized`` that between them launch every kernel real models need."""

import dataclasses
import itertools
from dataclasses import dataclass

import low_rank
import torch

from lora_kernels import select
from lora_kernels.ops import _quantized as ops
from lora_kernels.testing import LOW_RANK_DTYPES

#: What each kernel loads and stores a row at a time, which an aligned case does in a target's ``wide`` bits. Not the
#: codes: half a row of a block leaves a thread fewer.
WIDE = low_rank.WIDE | {
    "linear_kernel": ("x_block", "*y_at"),
    "linear_grad_kernel": ("dy_block", "*dx_at"),
    "dequantize_kernel": ("*at",),
}

#: As low_rank's.
KNOWN: dict[str, tuple[str, ...]] = {}

GROUPS = {"nf4": 64, "int4": 128, "int8": 4096}


@dataclass(frozen=True)
class Case:
    """A product with a weight ``[N, K]`` and one adapter, its gradient, or the weight unpacked in x's dtype."""

    op: str
    dtypes: str
    fmt: str = "nf4"
    M: int = 1
    R: int = 16
    K: int = 4096
    N: int = 4096

    name = low_rank.Case.name
    aligned = property(lambda self: not any(n % 16 for n in (self.R, self.K, self.N)))

    def run(self):
        dtype, factors, _ = LOW_RANK_DTYPES[self.dtypes]
        M, N, K, R, group = self.M, self.N, self.K, self.R, GROUPS[self.fmt]
        scales, table = torch.empty(N, K // group), torch.empty(16)
        weight = torch.empty(N, K // 2, dtype=torch.uint8), scales, None, table, group
        if self.fmt == "int4":
            weight = weight[0], scales, torch.empty_like(scales), table, group
        elif self.fmt == "int8":
            weight = torch.empty(N, K, dtype=torch.int8), scales, None, None, group
        x, dy = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
        A, B, v = torch.empty(R, K, dtype=factors), torch.empty(N, R, dtype=factors), torch.empty(1, M, R)
        if self.op == "dequantize":
            ops.dequantize_(torch.empty(N, K, dtype=dtype), *weight, 0, 0)
        elif self.op == "linear":
            ops.quantized_linear(x, *weight, None, v, [B], *(None,) * 6, 2.0)
        else:
            ops.quantized_linear_grad(dy, *weight, K, v[0], A, 2.0)


FEW, SOME, MANY = 1, 64, 8192

#: The formats take turns: each is in few instructions of what a tile makes of a kernel.
CASES = (
    Case("linear", "bf16", "nf4", FEW),
    Case("linear", "bf16", "int4", SOME),
    Case("linear", "bf16", "nf4", MANY),
    Case("linear", "bf16-masters", "nf4", MANY),
    Case("linear", "fp16", "int8", MANY),
    Case("linear", "fp32", "int4", FEW),
    Case("linear", "fp32", "nf4", MANY),
    Case("grad", "bf16", "int4", SOME),
    Case("grad", "bf16", "nf4", MANY),
    Case("grad", "bf16-masters", "nf4", MANY),
    Case("grad", "fp32", "int8", MANY),
    Case("dequantize", "bf16", "nf4"),
    Case("dequantize", "fp32", "int4"),
)


def choices(gpu):
    """Calls ``select.py`` for what running and training real models needs."""
    sizes = (2048, 4096, 14336)
    for N, K, fmt, dtypes in itertools.product(sizes, sizes, GROUPS, ("bf16", "bf16-masters", "fp16", "fp32")):
        x, factors, _ = LOW_RANK_DTYPES[dtypes]
        group = K if fmt == "int8" else GROUPS[fmt]
        select.dequantize_tiles(K, group)
        for rows in (FEW, 16, SOME, 512, 2048, MANY):
            if dtypes == "bf16" or rows >= 512 or (dtypes == "fp32" and rows <= 16):
                select.quantized_tiles(rows, N, K, group, x, factors, gpu)
            if (dtypes == "bf16" and rows > 16) or (rows >= 512 and dtypes != "fp16"):
                select.quantized_grad_tiles(rows, N, K, group, x, factors, gpu)


def kind(tiles, dtypes):
    """What of the choice makes for other machine code; a shared sum is stored in fp32."""
    if isinstance(tiles, select.QuantizedTiles):
        tiles = dataclasses.replace(tiles, split=1, steps=0)
    elif not isinstance(tiles, select.DequantizeTiles):
        return low_rank.kind(tiles, dtypes)
    return tiles, dtypes
