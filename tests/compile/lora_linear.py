"""The calls of ``lora_linear`` that between them launch every kernel a real model's training needs."""

import dataclasses
import itertools
from dataclasses import dataclass

import low_rank
import torch

from lora_kernels import select
from lora_kernels.ops import _lora_linear as ops
from lora_kernels.testing import LOW_RANK_DTYPES

#: What each kernel loads and stores a row at a time, which an aligned case does in a target's ``wide`` bits.
WIDE = low_rank.WIDE | {
    "expand_grad_kernel": ("dy_block",),
    "in_grad_kernel": ("x_block", "before", "*dx_at", "*at"),
    "add_up_kernel": ("acc", "*out + i"),
    "dropout_kernel": ("block", "*out + m[:, None] * K + kk[None, :]"),
}

#: As low_rank's.
KNOWN = {
    # 16 bytes each at 96 registers of 255: ptxas' own choice.
    "forward fp32 M=512 R=16 dropout=True: expand_kernel: spills": ("sm_100 Triton 3.9",),
    "forward bf16-masters M=8192 R=16 columns=True: shrink_kernel: spills": ("sm_100 Triton 3.9",),
}


@dataclass(frozen=True)
class Case:
    """A step of a layer, forward or backward; ``columns``: scaled by column, with another output beside and a bias."""

    op: str
    dtypes: str
    M: int
    R: int
    K: int = 4096
    N: int = 4096
    dropout: bool = False
    columns: bool = False

    name = low_rank.Case.name
    aligned = property(lambda self: not any(n % 16 for n in (2 * self.R, self.K, self.N)))

    def run(self):
        dtype, factors, _ = LOW_RANK_DTYPES[self.dtypes]
        x, y = torch.empty(self.M, self.K, dtype=dtype), torch.empty(self.M, self.N, dtype=dtype)
        A, B = torch.empty(self.R, self.K, dtype=factors), torch.empty(self.N, self.R, dtype=factors)
        seed = torch.empty(1, dtype=torch.int64) if self.dropout else None
        if self.op == "dropout":
            ops.lora_dropout(x, seed, 0.1)
        elif self.op == "forward":
            scale, bias = torch.empty(self.N), torch.empty(self.N, dtype=dtype)
            columns = (scale, torch.empty_like(y), scale, bias) if self.columns else (None,) * 4
            ops.lora_forward_(y, x, A, B, *columns, seed, 0.1, 2.0)
        else:
            v = torch.empty(self.M, self.R)
            columns = (y, torch.empty(self.N, dtype=dtype), torch.empty(self.N)) if self.columns else (None,) * 3
            dv = ops.lora_out_grads(torch.empty_like(y), v, B, *columns, 2.0, True, True)[0]
            ops.lora_in_grads_(torch.empty_like(x), dv, x, A, seed, 0.1, 2.0)


FEW, SOME, MANY = 128, 2048, 8192

CASES = (
    # Every rank of a training batch, with dropout, of two without.
    *(
        Case(op, "bf16", M, R, dropout=R not in plain)
        for plain in ((), (16, 64))
        for op in ("forward", "backward")
        for R in plain or (16, 32, 64, 128, 256)
        for M in ((SOME, MANY) if op == "forward" and R == 16 and not plain else (MANY,))
    ),
    # Other dtypes; masters, which PEFT makes, most.
    *(
        Case(op, dtypes, MANY, R, dropout=True)
        for op in ("forward", "backward")
        for dtypes, ranks in (
            ("bf16-masters", (16, 32, 64)),
            ("fp16", (16, 64)),
            ("fp16-masters", (16, 64)),
            ("fp32", (16, 32, 64)),
        )
        for R in ranks
    ),
    # Batches small enough for K to be split.
    *(
        Case("forward", dtypes, M, R, dropout=R < 128)
        for dtypes, M, R in (
            ("bf16", FEW, 16), ("bf16", FEW, 32), ("bf16", FEW, 64), ("bf16", FEW, 128), ("bf16", 512, 32),
            ("bf16", 512, 64), ("bf16-masters", FEW, 16), ("bf16-masters", FEW, 64), ("fp32", FEW, 16),
            ("fp32", 512, 16), ("fp32", 512, 32),
        )
    ),
    # A DoRA's columns, whose factors are always fp32; its own kernels beside have no dropout.
    *(
        Case(op, dtypes, MANY, R, columns=True, dropout=dtypes != "bf16-masters")
        for op in ("forward", "backward")
        for dtypes, ranks in (("bf16-masters", (16, 32, 64)), ("fp16-masters", (16,)), ("fp32", (16, 32, 64)))
        for R in ranks
    ),
    *(Case("dropout", dtypes, MANY, 16, dropout=True) for dtypes in ("bf16", "fp32")),
)  # fmt: skip


def choices(gpu):
    """Calls ``select.py`` for what training real models needs."""
    ranks, batches = (8, 16, 32, 64, 128, 256), (128, 512, 2048, 8192)
    for R, rows, dtypes in itertools.product(ranks, batches, ("bf16", "bf16-masters", "fp16", "fp16-masters", "fp32")):
        x, factors, _ = LOW_RANK_DTYPES[dtypes]
        if factors != torch.float16 or rows > FEW:  # which low_rank's cases have in fp16
            select.expand_tiles(rows, 1, 4096, R, 1, factors, gpu)
        for K in (2048, 4096, 14336):
            for dropout in (False, True):
                select.shrink_tiles(rows, 1, K, R, 1, x, factors, gpu, dropout)
            select.in_grad_tiles(rows, K, R, x, factors, gpu)
        for columns in (False, True)[: 2 if factors == torch.float32 else 1]:
            select.expand_grad_tiles(R, x, factors, gpu, columns)
        select.outer_tiles(4096)


def kind(tiles, dtypes):
    """What of the choice makes for other machine code."""
    if isinstance(tiles, select.InGradTiles):
        return dataclasses.replace(tiles, size=0), dtypes
    return low_rank.kind(tiles, dtypes)
