"""The calls of ``low_rank`` that between them launch every kernel a real model needs."""

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from lora_kernels import select
from lora_kernels.ops import low_rank as ops
from lora_kernels.testing import LOW_RANK_DTYPES

#: What each kernel loads and stores a row at a time, which an aligned case does in a target's ``wide`` bits.
WIDE = {
    "shrink_kernel": ("x_block", "a_block"),
    "expand_kernel": ("b_block", "before", "*y_at"),
    "outer_kernel": ("u_block", "w_block", "*at"),
}


#: Faults that stand until the kernel is better, by how they begin, and the targets (under one Triton) that show them.
KNOWN = {
    # The live rank is a number of the run, so Triton masks B's rows element by element.
    "add bf16 M=8192 R=16 L=64 N=(4096,1024,1024) scaling=True ranks=True: expand_kernel: accesses b_block by 16": (
        "sm_80", "sm_90", "sm_100", "gfx942",
    ),
    "halves bf16 M=16 R=16 L=64 scaling=True ranks=True: expand_kernel: accesses b_block by 16": (
        "sm_80", "sm_90", "sm_100", "gfx942",
    ),
    # The loads of all 56 parts of v are under way at once.
    "add bf16 M=500 R=64 K=28672 routing=none: expand_kernel: spills": ("gfx942",),
    # 16 bytes.
    "add bf16 M=16 R=128 L=64: expand_kernel: spills": ("sm_90 Triton 3.9",),
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
        """Whether every row of x, y, A and B begins at a multiple of 16 elements, which Triton knows of."""
        return not any(n % 16 for n in (self.R, self.K, *self.N))

    def run(self):
        x_dtype, factor_dtype, y_dtype = LOW_RANK_DTYPES[self.dtypes]
        pairs, S = self.M * self.k, len(self.N)
        x = torch.empty(self.M, self.K, dtype=x_dtype)
        y = torch.empty(self.M, sum(self.N), dtype=y_dtype)
        A = tuple(torch.empty(self.L, self.R, self.K, dtype=factor_dtype) for _ in self.N)
        B = tuple(torch.empty(self.L, n, self.R, dtype=factor_dtype) for n in self.N)
        scaling = torch.empty(S, self.L) if self.scaling else None
        ranks = torch.empty(S, self.L, dtype=torch.int32) if self.ranks else None
        weights = torch.empty(self.M, self.k) if self.k > 1 else None
        ids, indptr, plan = self._route(pairs)
        if self.op == "add":
            ops.lora_add_(y, x, A, B, ids, indptr, plan, scaling, ranks, weights, 1.0)
            return
        v = ops.lora_shrink(x, A, ids, indptr, plan, ranks, pairs)
        if self.op == "halves":
            ops.lora_expand_(y, v, B, ids, indptr, plan, scaling, ranks, weights, 1.0)
            return
        need = [True] * S
        route = (ids, indptr, plan)
        ops.lora_backward(y, x, A, B, v, route, scaling, ranks, weights, 1.0, True, self.k > 1, need, need)

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
    Case("add", "bf16", MANY, 16, L=64, N=(4096, 1024, 1024), scaling=True, ranks=True),
    Case("add", "bf16", FEW, 16, L=64, scaling=True, k=2),
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
    # Gradients: the same kernels with transposed factors, and the outer products.
    *(Case("backward", "bf16", MANY, R, routing="none") for R in (16, 64)),
    Case("backward", "bf16", FEW, 16, L=64, scaling=True),
    Case("backward", "bf16-masters", MANY, 16, L=64, scaling=True),
    Case("backward", "fp32", MANY, 32, routing="none"),
)


def choices(gpu):
    """Calls ``select.py`` for what real models need."""
    ranks, batches = (8, 16, 32, 64, 128, 256, 512), (1, 8, 64, 256, 300, 1024, 2000, 8192)
    for R, pairs, L, (x, factors, _) in itertools.product(ranks, batches, (1, 64), LOW_RANK_DTYPES.values()):
        select.expand_tiles(pairs, L, R, factors)
        for K in (2048, 4096, 14336):
            select.shrink_tiles(pairs, L, K, R, x, factors, gpu)
            select.outer_tiles(R, K)
            select.outer_tiles(K, R)


def kind(tiles, dtypes):
    """What of the choice makes for other machine code: not the length of a sum and of its parts."""
    if isinstance(tiles, select.ShrinkTiles):
        return dataclasses.replace(tiles, chunk=0, chunks=0, split=min(tiles.split, 2))
    return tiles, dtypes
