"""The calls of ``low_rank`` that between them launch every kernel a real model needs."""

import dataclasses
import itertools
from dataclasses import dataclass
from unittest.mock import patch

import torch
from lora_kernels.kernels.triton import _device

from lora_kernels import select
from lora_kernels.ops import _low_rank as ops
from lora_kernels.testing import LOW_RANK_DTYPES

#: What each kernel loads and stores a row at a time, which an aligned case does in a target's ``wide`` bits.
WIDE = {
    "shrink_kernel": ("x_block", "a_block"),
    "expand_kernel": ("block", "before", "*y_at"),
    "add_kernel": ("x_block", "a_block", "block", "before", "*y_at"),
    "expand_grad_kernel": ("dy_block", "block"),
    "outer_kernel": ("w_block", "*at"),
    "gather_kernel": ("acc", "*out + l.to(tl.int64) * size + i"),
}

#: Faults that stand until the kernel is better, by how they begin, and the targets (under one Triton) that show them.
KNOWN = {
    # 56 bytes at 64 registers of 255: ptxas' own choice.
    "backward bf16 M=8192 R=16 L=8 N=(4096,1024,1024) scaling=True ranks=True: outer_kernel: spills": (
        "sm_100 Triton 3.9",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call on M rows, or its gradients; ``k``: adapters a row mixes."""

    op: str
    dtypes: str
    M: int
    R: int
    L: int = 1
    K: int = 4096
    N: tuple[int, ...] = (4096,)
    routing: str = "plan"
    form: str = "stacks"
    k: int = 1
    scaling: bool = False
    ranks: bool = False

    @property
    def name(self):
        said = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)[2:]]
        assumed = [f"{f.name}={f.default}" for f in dataclasses.fields(self)]
        return " ".join([self.op, self.dtypes, *(part for part in said if part not in assumed)]).replace(", ", ",")

    @property
    def aligned(self):
        """Whether every row of x, y and A begins at a multiple of 16 elements, which Triton knows of, B's of 8."""
        return not any(n % 16 for n in (2 * self.R, self.K, *self.N))

    def run(self):
        x_dtype, factor_dtype, y_dtype = LOW_RANK_DTYPES[self.dtypes]
        pairs, S = self.M * self.k, len(self.N)
        x = torch.empty(self.M, self.K, dtype=x_dtype)
        y = torch.empty(self.M, sum(self.N), dtype=y_dtype)
        A = tuple(torch.empty(self.L, self.R, self.K, dtype=factor_dtype) for _ in self.N)
        B = tuple(torch.empty(self.L, n, self.R, dtype=factor_dtype) for n in self.N)
        if self.form == "list":
            A, B = list(A[0]), list(B[0])
        elif self.form == "packed":
            A = (torch.empty(self.L, S * self.R, self.K, dtype=factor_dtype),)
        scaling = torch.empty(S, self.L) if self.scaling else None
        ranks = torch.empty(S, self.L, dtype=torch.int32) if self.ranks else None
        weights = torch.empty(self.M, self.k) if self.k > 1 else None
        ids, indptr, plan = self._route(pairs)
        if self.op in ("add", "one kernel"):
            gpu = dataclasses.replace(_device.gpu(x.device), recompute=1 << 30 if self.op == "one kernel" else 0)
            with patch.object(_device, "gpu", lambda device: gpu):
                ops.lora_add_(y, x, A, B, ids, indptr, plan, scaling, ranks, weights, 1.0)
            return
        v = ops.lora_shrink(x, A, ids, indptr, plan, ranks, pairs)
        if self.op == "shrink":
            return
        if self.op == "halves":
            ops.lora_expand_(y, v, B, ids, indptr, plan, scaling, ranks, weights, 1.0)
            return
        need = True, self.k > 1, True, True
        ops.lora_grads(y, x, None, A, B, v, plan, scaling, ranks, weights, 1.0, *need)

    def _route(self, pairs):
        """(ids, indptr, plan), of which the op makes a plan where it is given none."""
        if self.routing == "plan":
            return None, None, torch.empty(self.L + 3 + pairs, dtype=torch.int32)
        if self.routing == "segments":
            return torch.empty(self.L, dtype=torch.int64), torch.empty(self.L + 1, dtype=torch.int64), None
        if self.routing == "ids":
            return torch.empty(self.M, *([self.k] if self.k > 1 else []), dtype=torch.int64), None, None
        return None, None, None


FEW, MANY = 16, 8192

CASES = (
    # Every rank: decoding with 64 adapters; a batch that few rows of each make large; one adapter's prompt and a
    # training batch.
    *(Case("add", "bf16", FEW, R, L=64) for R in (16, 32, 64, 128)),
    *(Case("add", "bf16", 1024, R, L=64) for R in (64, 128)),
    Case("add", "bf16", 2000, 32, L=64),
    *(Case("add", "bf16", 500, R, routing="none") for R in (16, 32, 64)),
    *(Case("add", "bf16", MANY, R, routing="none") for R in (16, 32, 64, 128, 512)),
    # Every dtype, at ranks of one block and of several.
    *(Case("add", "fp16", FEW, R, L=64) for R in (16, 32, 64, 128)),
    *(Case("add", "fp16", MANY, R, routing="none") for R in (16, 32, 64, 128)),
    Case("add", "bf16-y32", MANY, 16, routing="none"),
    Case("add", "fp32", FEW, 16, L=64),
    Case("add", "fp32", 1024, 64, L=64),
    Case("add", "fp32", 500, 16, routing="none"),
    Case("add", "fp32", MANY, 64, routing="none"),
    Case("add", "bf16-masters", FEW, 64, L=64),
    Case("add", "bf16-masters", 500, 32, routing="none"),
    Case("add", "bf16-masters", MANY, 16, routing="none"),
    # Fused projections, mixtures, scaling and live ranks.
    Case("add", "bf16", FEW, 16, L=64, N=(4096, 1024, 1024), scaling=True),
    *(Case("add", "bf16", MANY, R, L=64, N=(4096, 1024, 1024), scaling=True, ranks=True) for R in (16, 32)),
    *(Case("shrink", "bf16", 500, R, L=8, N=(4096, 1024, 1024)) for R in (16, 32)),
    *(Case("shrink", "bf16", M, R, L=8, N=(14336, 14336)) for M in (500, MANY) for R in (16, 32, 64)),
    *(Case("shrink", "fp32", M, 16, L=8, N=(14336, 14336)) for M in (500, MANY)),
    Case("add", "bf16", FEW, 16, L=64, scaling=True, k=2),
    # Factors in a list and packed ones.
    *(Case("add", "bf16-masters", M, 16, L=8, form="list") for M in (FEW, MANY)),
    Case("add", "bf16", FEW, 64, L=8, form="list"),
    *(Case("add", "bf16", M, 16, L=8, N=(4096, 1024, 1024), ranks=True, form="packed") for M in (FEW, MANY)),
    # One kernel for both halves, for small factors.
    *(Case("one kernel", "bf16", FEW, R, L=8, K=1024) for R in (8, 16, 64)),
    Case("one kernel", "bf16", FEW, 16, L=8, K=1024, N=(1024, 256, 256), scaling=True, ranks=True),
    Case("one kernel", "fp32", FEW, 16, L=8, K=1024),
    # Every way to say which row uses which adapter.
    Case("add", "bf16", FEW, 16, L=64, routing="ids"),
    Case("add", "bf16", MANY, 16, L=64, routing="ids"),
    Case("add", "bf16", MANY, 16, L=64, routing="segments"),
    Case("halves", "bf16", FEW, 16, L=64, scaling=True, ranks=True),
    # Down projections, whose sums have longer chunks; the second's last chunk is half empty.
    *(Case("add", "bf16", FEW, 16, L=64, K=K) for K in (14336, 11008)),
    *(Case("add", "bf16", MANY, 16, routing="none", K=K) for K in (14336, 11008)),
    Case("add", "bf16", MANY, 64, routing="none", K=14336),
    Case("add", "fp32", 500, 64, routing="none", K=14336),
    Case("add", "bf16", 500, 64, routing="none", K=28672),
    # A rank whose rows Triton does not know to be aligned.
    Case("add", "bf16", FEW, 8, L=64),
    Case("add", "bf16", MANY, 8, routing="none"),
    # Gradients: the same kernels with transposed factors, and those of their own.
    *(Case("backward", "bf16", MANY, R, routing="none") for R in (16, 32, 64, 128)),
    Case("backward", "bf16", MANY, 16, L=8, N=(4096, 1024, 1024), scaling=True, ranks=True),
    Case("backward", "bf16", FEW, 16, L=64, scaling=True, k=2),
    Case("backward", "bf16-masters", MANY, 16, L=64, scaling=True),
    Case("backward", "bf16-masters", MANY, 32, routing="none"),
    *(Case("backward", "fp32", MANY, R, routing="none") for R in (16, 32)),
)


def choices(gpu):
    """Calls ``select.py`` for what real models need."""
    ranks, batches = (8, 16, 32, 64, 128, 256, 512), (1, 8, 64, 256, 300, 1024, 2000, 8192)
    for R, pairs, L, (x, factors, _) in itertools.product(ranks, batches, (1, 64), LOW_RANK_DTYPES.values()):
        select.expand_tiles(pairs, L, 4096, R, 1, factors, gpu)
        for K, S in itertools.product((2048, 4096, 14336), (1, 2, 3)):
            select.shrink_tiles(pairs, L, K, R, S, x, factors, gpu)
        select.expand_tiles(8192, 1, 4096, R, 1, factors, gpu)
        select.outer_tiles(R)
        select.expand_grad_tiles(R, x, factors, gpu)


def kind(tiles, dtypes):
    """What of the choice makes for other machine code: not the length of a sum and of its parts, or of a loop."""
    if isinstance(tiles, select.ShrinkTiles):
        return dataclasses.replace(tiles, chunk=0, chunks=0, split=min(tiles.split, 2))
    if isinstance(tiles, select.ExpandTiles):
        return dataclasses.replace(tiles, group=min(tiles.group, 2)), dtypes
    if isinstance(tiles, select.ExpandGradTiles) and not tiles.fused:
        return "not fused"
    return tiles, dtypes
