"""The cases of ``gpu_low_rank.py``: one linear layer with its adapters, and the ways to write them in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from compare import OURS, check

import lora_kernels as lk
from lora_kernels.ops._low_rank import lora_add_

Call = Callable[[int], None]  # the adapters' part of a layer, added to its y

# K and N of each slice. Qwen3-8B has Llama-3.1-8B's qkv and o.
SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
    "Qwen gate_up": (4096, (12288, 12288)),
    "Qwen down": (12288, (4096,)),
}
MIXED = (8, 16, 32, 64)  # live ranks of a padded 64
# rows, adapters
DECODE = [(1, 1), (8, 1), (8, 8), (64, 1), (64, 8), (64, 64), (256, 64)]
PREFILL = [(512, 1), (2048, 8), (8192, 8)]
FEW = [(8, 8), (64, 8), (64, 64), (2048, 8)]
ENDS = [(64, 64), (2048, 8)]
# What to measure, the more telling first: all batches at the usual rank, all ranks at a few batches, other layers.
GRID = [
    (("o", "gate_up"), (16,), DECODE + PREFILL),
    (("o", "gate_up"), (8, 64, 128, "mixed"), FEW),
    (("Qwen gate_up", "Qwen down"), (16,), [(8, 8), *ENDS]),
    (("qkv", "down"), (16,), [(1, 1), *FEW, (8192, 8)]),
    (("qkv", "down"), (64, "mixed"), ENDS),
    (("Qwen gate_up", "Qwen down"), (64,), ENDS[:1]),
    (("down",), (128,), ENDS[1:]),
    (("o", "gate_up"), (64,), [(1, 1)]),
]


def cases(dry: bool) -> Iterator[tuple[str, int, int, int | str]]:
    """(site, rows, adapters, rank) of every case; without the large ones where it is a dry run."""
    for sites, ranks, batches in GRID:
        for site in sites:
            for rank in ranks:
                for rows, adapters in batches:
                    if not dry or rows <= 8 or (rows <= 64 and site == "o"):
                        yield site, rows, adapters, rank


class Case:
    """The tensors of one layer shape, over as many layers as the cache needs to be cold."""

    def __init__(self, site: str, rows: int, adapters: int, rank: int | str, device: str, layers: int):
        self.site, self.rows, self.adapters, self.rank = site, rows, adapters, rank
        K, widths = SITES[site] if device == "cuda" else (64, tuple(n // 64 for n in SITES[site][1]))
        R = MIXED[-1] if rank == "mixed" else rank
        make = lambda *size: torch.randn(size, device=device, dtype=torch.bfloat16)  # noqa: E731
        self.ids = torch.arange(rows, device=device).mul(adapters).div(rows, rounding_mode="floor")
        self.bounds = [(self.ids == l).nonzero().flatten()[[0, -1]].tolist() for l in range(adapters)]
        self.live = [MIXED[l % 4] if rank == "mixed" else R for l in range(adapters)]
        self.ranks = torch.tensor(self.live, dtype=torch.int32, device=device) if rank == "mixed" else None
        self.plan = lk.BatchPlan.from_ids(self.ids, adapters)
        self.offsets = torch.tensor([stop + 1 for _, stop in self.bounds], dtype=torch.int32, device=device)
        self.x, self.y = make(rows, K), [make(rows, sum(widths)) for _ in range(layers)]
        self.W = [make(sum(widths), K) for _ in range(min(layers, max(2, 2**27 // (2 * K * sum(widths)))))]
        self.A = [tuple(make(adapters, R, K) / K**0.5 for _ in widths) for _ in range(layers)]
        self.B = [tuple(make(adapters, n, R) for n in widths) for _ in range(layers)]
        if self.ranks is not None:  # zeros past the live rank, for those who can't be told it
            lives = torch.arange(R, device=device) < self.ranks[:, None]  # [L, R]
            for a, b in zip(sum(self.A, ()), sum(self.B, ()), strict=True):
                a.mul_(lives[:, :, None])
                b.mul_(lives[:, None, :])
        self.layers, self.padded_rank = layers, R
        self.bytes = sum(2 * r * (len(widths) * K + sum(widths)) for r in self.live)
        cache = torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 2**40
        self.bytes += sum(b for b in (2 * rows * K, 4 * rows * sum(widths)) if b > cache // 4)

    def base(self, i: int) -> None:
        torch.mm(self.x, self.W[i % len(self.W)].T, out=self.y[i])

    def ours(self, i: int) -> None:
        lk.bgmv(self.y[i], self.x, self.A[i], self.B[i], self.plan, ranks=self.ranks)

    def by(self, kernels: str, i: int) -> None:
        with lk.backend(kernels):
            self.ours(i)

    def by_clusters(self, i: int) -> None:
        torch.ops.lora_kernels_C.set_clusters(True)
        self.by("cuda", i)
        torch.ops.lora_kernels_C.set_clusters(False)

    def addmm(self, i: int) -> None:
        """A loop over the adapters, whose rows are contiguous, ordered by hand and in place."""
        column = 0
        for a, b in zip(self.A[i], self.B[i], strict=True):
            for l, (start, stop) in enumerate(self.bounds):
                rows, r = slice(start, stop + 1), self.live[l]
                v = torch.mm(self.x[rows], a[l, :r].T)
                self.y[i][rows, column : column + b.shape[1]].addmm_(v, b[l, :, :r].T)
            column += b.shape[1]

    def loop(self, i: int) -> None:
        """The loop as it is mostly written: each adapter's delta, then added."""
        column = 0
        for a, b in zip(self.A[i], self.B[i], strict=True):
            for l, (start, stop) in enumerate(self.bounds):
                rows, r = slice(start, stop + 1), self.live[l]
                y = self.y[i][rows, column : column + b.shape[1]]
                y += self.x[rows] @ a[l, :r].T @ b[l, :, :r].T
            column += b.shape[1]

    def gather(self, i: int) -> None:
        """Each row's factors gathered, two batched products."""
        column = 0
        for a, b in zip(self.A[i], self.B[i], strict=True):
            v = torch.bmm(a[self.ids], self.x[:, :, None])
            y = self.y[i][:, column : column + b.shape[1]]
            y += torch.bmm(b[self.ids], v)[:, :, 0]
            column += b.shape[1]

    def grouped(self, i: int) -> None:
        """torch's grouped matmul, twice."""
        column = 0
        for a, b in zip(self.A[i], self.B[i], strict=True):
            v = torch._grouped_mm(self.x, a.mT, offs=self.offsets)
            y = self.y[i][:, column : column + b.shape[1]]
            y += torch._grouped_mm(v, b.mT, offs=self.offsets)
            column += b.shape[1]

    def providers(self) -> dict[str, Call]:
        """Those that this case suits."""
        found = {OURS: self.ours}
        for name in sorted(lora_add_.backends() & {"cuda", "triton"} if self.x.is_cuda else ()):
            found[f"{OURS}: {name}"] = lambda i, name=name: self.by(name, i)
        if f"{OURS}: cuda" in found and torch.cuda.get_device_capability() >= (9, 0):
            found[f"{OURS}: cuda, clusters"] = self.by_clusters
        if self.adapters <= 8:
            found["addmm loop"], found["torch loop"] = self.addmm, self.loop
        if self.ranks is None:
            if self.rows <= 64:
                found["gather + bmm"] = self.gather
            if self.x.is_cuda and self.adapters > 1:
                found["torch._grouped_mm"] = self.grouped
        return found

    def checker(self) -> Callable[[str, Call], None]:
        """Raises an AssertionError where a provider's result is not right, as ``compare.check`` has it."""
        self.base(0)
        before = self.y[0].clone()
        self.addmm(0)
        plain = self.y[0].clone()
        exact, column = before.double(), 0
        for a, b in zip(self.A[0], self.B[0], strict=True):
            for l, (start, stop) in enumerate(self.bounds):
                rows, r = slice(start, stop + 1), self.live[l]
                delta = self.x[rows].double() @ a[l, :r].double().T @ b[l, :, :r].double().T
                exact[rows, column : column + b.shape[1]] += delta
            column += b.shape[1]

        def right(name: str, call: Call) -> None:
            self.y[0].copy_(before)
            call(0)
            check({name: self.y[0]}, exact, plain, what=f"{self.site}, {self.rows} rows, rank {self.rank}")

        return right
