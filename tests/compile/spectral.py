"""The calls of ``spectral`` that between them launch every kernel real models need; not those of ``transforms``."""

import dataclasses
import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import low_rank
import torch

from lora_kernels import select
from lora_kernels.ops import _spectral as ops
from lora_kernels.ops import _transforms
from lora_kernels.reference.spectral import length_of
from lora_kernels.testing import LOW_RANK_DTYPES

#: What each kernel loads of the rows of a block at a time, or stores of them, which an aligned case does in a target's
#: ``wide`` bits. Not a product's result: a program of many entries has few numbers of it.
WIDE = {
    "block_kernel": ("x_block", "*out + (block * features + k) * BLOCK_M + i"),
    "product_kernel": ("number",),
    "dot_kernel": ("number",),
}

#: As low_rank's.
KNOWN: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Case:
    """A product with a spectrum of n coefficients, or its gradients."""

    op: str
    dtypes: str
    kind: str = "dct"
    M: int = 1
    n: int = 1000
    K: int = 4096
    N: int = 4096

    name = low_rank.Case.name

    @property
    def aligned(self):
        """Whether numbers are gathered from rows side by side."""
        return self.kind != "haar" and select.spectral_tiles(self.M, self.N, self.n, max(self.K, self.N)).blocked

    def run(self):
        dtype, values, y = LOW_RANK_DTYPES[self.dtypes]
        M, N, K, kind = self.M, self.N, self.K, self.kind
        entries = 2 * self.n if kind == "fourier" else self.n
        by_row, by_column = (torch.empty(length_of(kind, size) + 1 + 2 * entries, dtype=torch.int32) for size in (N, K))
        x, dy, v = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(self.n, dtype=values)
        with ExitStack() as stack:
            for name in ("hadamard", "trigonometric", "haar"):
                stack.enter_context(patch.object(_transforms, name, lambda x, *_: torch.empty_like(x)))
            if self.op == "linear":
                ops.spectral_linear(x, v, by_row, torch.empty(M, N, dtype=y), None, (), kind, N, 1.0)
            else:
                ops.spectral_linear_grads(dy, x, v, by_row, by_column, None, (), kind, 1.0, True, True)


FEW, SOME, MANY = 1, 16, 8192
SPARSE, DENSE = 1000, 524288

CASES = (
    # Every tile: few entries and many, by one row of x, some and many.
    *(Case("linear", "bf16", "wht", M, n) for M in (FEW, SOME, MANY) for n in (SPARSE, DENSE)),
    Case("linear", "bf16", "wht", SOME, 20000),
    Case("linear", "bf16", "wht", MANY, 10000),
    # What is multiplied without an op of transforms before or after, in every dtype.
    *(Case("linear", dtypes, "identity", MANY) for dtypes in ("fp32", "fp16", "bf16-masters")),
    Case("linear", "bf16", "identity", MANY, DENSE),
    *(Case("linear", dtypes, "haar", MANY, 2592) for dtypes in ("fp32", "bf16")),
    *(Case("linear", "bf16", "haar", M, n) for M in (FEW, SOME, MANY) for n in (SPARSE, DENSE)),
    # Between two transforms.
    Case("linear", "bf16", "fourier", MANY),
    Case("linear", "bf16-masters", "dct", SOME),
    # Gradients.
    *(Case("grads", "bf16", "dct", M, n) for M in (FEW, SOME, MANY) for n in (SPARSE, DENSE)),
    Case("grads", "bf16", "wht", MANY, DENSE),
    *(Case("grads", "bf16", "haar", M, 2592) for M in (FEW, MANY)),
    Case("grads", "fp32", "identity", MANY),
    Case("grads", "bf16-masters", "identity", MANY, 20000),
)


def choices(gpu):
    """Calls ``select.py`` for what running and training real models needs."""
    sizes, batches = (1024, 4096, 14336), (FEW, 8, SOME, 64, 512, 2048, MANY)
    for N, K, n, rows in itertools.product(sizes, sizes, (SPARSE, 2592, 10000, DENSE), batches):
        for length, entries in ((N, n), (N, 2 * n), (K, n), (K, 2 * n)):
            select.spectral_tiles(rows, length, entries, max(N, K))
            select.spectral_tiles(rows, length, entries, K)
            select.spectral_dot_tiles(rows, entries, max(N, K), gpu)


def kind(tiles, dtypes):
    """What of the choice makes for other machine code."""
    if isinstance(tiles, select.SpectralDotTiles):
        tiles = dataclasses.replace(tiles, chunks=1, steps=1)
    return tiles, dtypes
