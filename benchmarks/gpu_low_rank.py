"""Times of the ``low_rank`` family on a GPU beside the strong ways to write it in PyTorch, as JSON.

    python benchmarks/gpu_low_rank.py --out DIR [--dry-run]

A case is one linear layer of Llama-3.1-8B with its adapters. Every provider runs in a captured graph over layers with
weights of their own, so nothing is in the cache from the layer before. ``alone_us`` is the time of the adapters' part
of a layer; ``exposed_us`` is what it adds to the layer's base matmuls. The floor counts the bytes that must be moved at
the measured read bandwidth: the factors of the adapters in use once, x once and y twice where they exceed a quarter
of the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

import lora_kernels as lk
from lora_kernels.ops._dispatch import has_triton
from lora_kernels.testing import assert_within_rule

SITES = {"qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)), "gate_up": (4096, (14336, 14336)),
         "down": (14336, (4096,))}  # fmt: skip
MIXED = (8, 16, 32, 64)  # live ranks of a padded 64
DECODE = [(1, 1), (8, 1), (8, 8), (64, 1), (64, 8), (64, 64), (256, 64)]  # rows, adapters
PREFILL = [(512, 1), (2048, 8), (8192, 8)]
REPLAYS = 20


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
        self.layers = layers
        self.bytes = sum(2 * r * (len(widths) * K + sum(widths)) for r in self.live)
        cache = torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 2**40
        self.bytes += sum(b for b in (2 * rows * K, 4 * rows * sum(widths)) if b > cache // 4)

    def base(self, i: int) -> None:
        torch.mm(self.x, self.W[i % len(self.W)].T, out=self.y[i])

    def ours(self, i: int) -> None:
        lk.bgmv(self.y[i], self.x, self.A[i], self.B[i], self.plan, ranks=self.ranks)

    def addmm(self, i: int) -> None:
        """A loop over the adapters, whose rows are contiguous."""
        column = 0
        for a, b in zip(self.A[i], self.B[i], strict=True):
            for l, (start, stop) in enumerate(self.bounds):
                rows, r = slice(start, stop + 1), self.live[l]
                v = torch.mm(self.x[rows], a[l, :r].T)
                self.y[i][rows, column : column + b.shape[1]].addmm_(v, b[l, :, :r].T)
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

    def providers(self) -> dict[str, Callable[[int], None]]:
        """Those that this case suits."""
        found = {"lora_kernels": self.ours}
        if self.adapters <= 8:
            found["addmm loop"] = self.addmm
        if self.ranks is None:
            if self.rows <= 64:
                found["gather + bmm"] = self.gather
            if self.x.is_cuda and self.adapters > 1:
                found["torch._grouped_mm"] = self.grouped
        return found

    def check(self) -> None:
        """Ours within the error rule of the exact result, beside plain PyTorch's error."""
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
        self.y[0].copy_(before)
        self.ours(0)
        assert_within_rule(self.y[0], exact, plain, what=f"{self.site}, {self.rows} rows, rank {self.rank}")


def captured(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """A replay of the calls."""
    if not torch.cuda.is_available():
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph.replay


def times(replays: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median µs of each, taken in turns."""
    if not torch.cuda.is_available():
        for replay in replays.values():
            replay()
        return dict.fromkeys(replays, float("nan"))
    events = {name: [] for name in replays}
    for _ in range(REPLAYS):
        for name, replay in replays.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def measure(case: Case, read: float) -> dict:
    """One case's row of the results."""
    case.check()
    layers = range(case.layers)
    replays = {"base": captured([lambda i=i: case.base(i) for i in layers])}
    for name, add in case.providers().items():
        replays[name] = captured([lambda i=i, add=add: add(i) for i in layers])
        replays["base + " + name] = captured([lambda i=i, add=add, f=f: f(i) for i in layers for f in (case.base, add)])
    took = {name: t / case.layers for name, t in times(replays).items()}
    return {
        "site": case.site, "rows": case.rows, "adapters": case.adapters, "rank": case.rank, "bytes": case.bytes,
        "floor_us": case.bytes / read * 1e6, "base_us": took["base"],
        "providers": {
            name: {"alone_us": took[name], "exposed_us": took["base + " + name] - took["base"]}
            for name in case.providers()
        },
    }  # fmt: skip


def roofs() -> dict[str, float]:
    """Bytes a second of a read and of a copy, bf16 operations a second of a large matmul."""
    if not torch.cuda.is_available():
        return {"read": 1.0, "copy": 1.0, "bf16": 1.0}
    big = torch.randn(2**28, device="cuda")
    other = torch.empty_like(big)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    took = times({"read": big.sum, "copy": lambda: other.copy_(big), "bf16": lambda: a @ b})
    return {
        "read": big.nbytes / took["read"] * 1e6,
        "copy": 2 * big.nbytes / took["copy"] * 1e6,
        "bf16": 2 * 8192**3 / took["bf16"] * 1e6,
    }


def machine() -> dict[str, str]:
    """What the results were measured on and with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    device = "gpu-" + "-".join(gpu.lower().split())
    return {
        "device": device,
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": version("triton") if has_triton("low_rank") else "",
    }


def cases(dry: bool):
    """(site, rows, adapters, rank) of every case; a few small ones where it is a dry run."""
    for site in SITES:
        for rows, adapters in DECODE + PREFILL:
            ranks = (16, 64, "mixed") if adapters >= 8 and rows <= 256 else (16, 64)
            for rank in ranks:
                if not dry or (rows <= 64 and rank != 64 and site in ("qkv", "o")):
                    yield site, rows, adapters, rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: the path, no times")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    found, now, rows = roofs(), datetime.now(timezone.utc), []
    for which in cases(options.dry_run):
        layers = 2 if options.dry_run else 4 if which[1] > 256 else 12
        with torch.no_grad():
            rows.append(measure(Case(*which, device, layers), found["read"]))
        ours = rows[-1]["providers"]["lora_kernels"]
        print(*which, f"floor {rows[-1]['floor_us']:.2f} base {rows[-1]['base_us']:.1f}",
              *(f"| {n} {p['alone_us']:.2f} +{p['exposed_us']:.2f}" for n, p in rows[-1]["providers"].items()),
              f"| {rows[-1]['floor_us'] / ours['alone_us']:.0%} of roof", flush=True)  # fmt: skip
        result = {"machine_info": machine(), "datetime": str(now), "replays": REPLAYS, "roofs": found, "cases": rows}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu_low_rank.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
