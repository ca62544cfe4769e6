"""The calls of ``transforms`` that between them launch every kernel real models need."""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import low_rank
import torch

from lora_kernels import select
from lora_kernels.ops import _transforms as ops
from lora_kernels.reference.hadamard import orders_of, signs_of
from lora_kernels.testing import TRANSFORM_DTYPES

#: What each kernel loads and stores a row at a time, which an aligned case does in a target's ``wide`` bits. Not the
#: trigonometric rows: the cosine's are read every other number, and each has an end of its own, N1 / 2.
WIDE = {
    "hadamard_kernel": ("x_block", "*y_at"),
    "haar_kernel": ("value", "*high_at", "*low_at"),
    "haar_transpose_kernel": ("value", "high", "*y_at"),
}

#: As low_rank's.
KNOWN: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Case:
    """A transform of rows of N numbers, or its transpose."""

    op: str
    dtypes: str
    N: int = 4096
    transpose: bool = False
    levels: int = 1

    name = low_rank.Case.name
    aligned = property(lambda self: self.N != 29568 and self.levels == 1)  # else halves and stages of odd lengths

    def run(self):
        x = torch.empty(8192, self.N, dtype=TRANSFORM_DTYPES[self.dtypes])
        if self.op == "haar":
            ops.haar(x, self.levels, self.transpose)
        elif self.op == "hadamard":
            orders = orders_of(self.N, "auto")
            ops.hadamard(x, signs_of(orders, x.device), list(orders), self.N**-0.5, self.transpose)
        else:
            ops.trigonometric(x, self.op, self.N**-0.5, (2 / self.N) ** 0.5, self.transpose)


BOTH = (False, True)

CASES = (
    # Every tile: a dense matrix of one block and of several, with Sylvester's of every order; in two stages.
    *(Case("hadamard", "bf16", N) for N in (896, 1024, 1536, 3072, 4096, 5376, 11008, 14336, 29568)),
    *(Case("hadamard", "fp16", N) for N in (4096, 14336)),
    *(Case("hadamard", "fp32", N) for N in (1024, 1536, 4096, 5376, 14336, 29568)),
    *(
        Case("cosine", "bf16", N, t)
        for N in (896, 1024, 1536, 2048, 2304, 3072, 4096, 4864, 5120, 11008, 14336)
        for t in BOTH
    ),
    *(Case("cosine", "fp16", N, t) for N in (4096, 14336) for t in BOTH),
    *(Case("cosine", "fp32", N, t) for N in (896, 1024, 2048, 4096, 14336) for t in BOTH),
    *(Case("fourier", "fp32", 4096, t) for t in BOTH),
    # Lengths of one factor, and a prime whose cosines are gathered.
    *(Case("hartley", "bf16", N, t) for N in (137, 8191) for t in BOTH),
    *(Case("haar", dtypes, 4096, t) for dtypes in TRANSFORM_DTYPES for t in BOTH),
    *(Case("haar", "bf16", 4096, t, 3) for t in BOTH),
)

#: Of rows that layers of language models read and write.
LENGTHS = (
    896, 1024, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 4864, 5120, 5376, 6144, 8192, 8960, 9216, 9728, 11008, 13696,
    13824, 14336, 16384, 18944, 21504, 25600, 27648, 28672, 29568,
)  # fmt: skip


def choices(gpu):
    """Calls ``select.py`` for what running and training real models needs."""
    for N, x in itertools.product(LENGTHS, TRANSFORM_DTYPES.values()):
        orders, inner = orders_of(N, "auto"), N
        stages = select.hadamard_stages(orders, N // math.prod(orders))
        for i, stage in enumerate(stages):
            L = math.prod(stage.orders) * stage.power
            inner //= L
            between = torch.float32, torch.float32
            ends = between[: i > 0] or (x,), between[: i + 1 < len(stages)] or (x,)
            select.hadamard_tiles(L, inner, stage.right, ends[0][0], ends[1][0], gpu)
        for transpose in BOTH:
            select.trigonometric_tiles(N, x, transpose, gpu)
    select.haar_tiles(4096, 1)


def kind(tiles, dtypes):
    """What of the choice makes for other machine code; fp16 is as bf16 is, and where numbers lie not of the tiles."""
    dtypes = tuple(torch.bfloat16 if dtype == torch.float16 else dtype for dtype in dtypes)
    if isinstance(tiles, select.TrigonometricTiles):
        tiles = dataclasses.replace(tiles, N2=min(tiles.N2, 2))
    return tiles, dtypes
