"""Times of the ``low_rank`` family on a GPU beside the strong ways to write it in PyTorch, as JSON.

    python benchmarks/gpu_low_rank.py --out DIR [--peers FOLDER] [--seconds S] [--dry-run]

A case is one linear layer of Llama-3.1-8B or Qwen3-8B with its adapters (``gpu_case.py``). Every provider runs in a
captured graph over layers with weights of their own, so nothing is in the cache from the layer before. ``alone_us`` is
the time of the adapters' part of a layer; ``exposed_us`` is what it adds to the layer's base matmuls. The floor counts
the bytes that must be moved at the measured read bandwidth: the factors of the adapters in use once, x once and y twice
where they exceed a quarter of the cache. FOLDER has other projects' kernels (``peers.py``). Cases that S seconds do not
suffice for are left out and counted. ``plans`` has the time of grouping a step's rows, in a captured graph too,
``training`` that of a forward and a backward pass as Python launches them, ``host`` that of Python for one call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from compare import OURS, check
from gpu_case import Case, cases
from lora_kernels.kernels.configs import slug
from peers import Peer, load, reason

import lora_kernels as lk
from lora_kernels.ops._dispatch import has_triton
from lora_kernels.ops._low_rank import lora_add_

REPLAYS = 20
PLANS = [(1, 1), (64, 8), (64, 64), (256, 64), (2048, 8), (8192, 8)]  # rows, adapters
HOST_CALLS = 100  # fewer than a GPU's queue has room for
TRAINING = [("o", 2048, 8, 16), ("gate_up", 8192, 8, 16)]


def captured(calls: list[Callable[[], object]]) -> Callable[[], None]:
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


def times(replays: dict[str, Callable[[], object]]) -> dict[str, float]:
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


@torch.no_grad()
def measure(case: Case, read: float, peers: dict[str, Peer]) -> dict:
    """One case's row of the results. Who fails here, other than we, is left out, with the reason."""
    right, layers, failed = case.checker(), range(case.layers), {}
    replays = {"base": captured([lambda i=i: case.base(i) for i in layers])}
    in_torch = {name: lambda _, call=call: call for name, call in case.providers().items()}
    for name, bind in {**in_torch, **peers}.items():
        try:
            if (call := bind(case)) is None:
                continue
            right(name, call)
            alone = captured([lambda i=i, call=call: call(i) for i in layers])
            both = captured([lambda i=i, f=f: f(i) for i in layers for f in (case.base, call)])
            replays.update({name: alone, "base + " + name: both})
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = reason(error)
    took = {name: t / case.layers for name, t in times(replays).items()}
    return {
        "site": case.site, "rows": case.rows, "adapters": case.adapters, "rank": case.rank, "bytes": case.bytes,
        "floor_us": case.bytes / read * 1e6, "base_us": took["base"],
        "providers": {
            name: {"alone_us": us, "exposed_us": took["base + " + name] - took["base"]}
            for name, us in took.items() if "base + " + name in took
        },
        **({"failed": failed} if failed else {}),
    }  # fmt: skip


@torch.no_grad()
def plan(rows: int, adapters: int, device: str) -> dict:
    """The time of a plan's update, which a step does once and all its layers share."""
    ids = torch.randint(-1, adapters, (rows,), device=device)
    made = lk.BatchPlan.from_ids(ids, adapters)
    updates = captured([lambda: made.update_(ids)] * REPLAYS)
    return {"rows": rows, "adapters": adapters, "us": times({"": updates})[""] / REPLAYS}


def training(site: str, rows: int, adapters: int, rank: int, device: str) -> dict:
    """The times of a forward and a backward pass of the adapters' part, gradients of x and the factors checked."""
    case = Case(site, rows, adapters, rank, device, 1)
    leaves, slices = [t.requires_grad_() for t in (case.x, *case.A[0], *case.B[0])], len(case.A[0])
    base, dy = case.y[0], torch.randn_like(case.y[0])

    def ours(x, *factors):
        return lk.multi_lora(x, factors[:slices], factors[slices:], case.plan, y=base)

    def loop(x, *factors):
        pairs = list(zip(factors[:slices], factors[slices:], strict=True))
        deltas = [torch.cat([x[start : stop + 1] @ a[l].T @ b[l].T for a, b in pairs], dim=1)
                  for l, (start, stop) in enumerate(case.bounds)]  # fmt: skip
        return base + torch.cat(deltas)

    steps = {name: lambda f=f: torch.autograd.grad(f(*leaves), leaves, dy)
             for name, f in ((OURS, ours), ("torch loop", loop))}  # fmt: skip
    wide = [t.detach().double().requires_grad_() for t in leaves]
    oracle = torch.autograd.grad(loop(*wide), wide, dy.double())
    for i, (got, exact, plain) in enumerate(zip(steps[OURS](), oracle, steps["torch loop"](), strict=True)):
        check({OURS: got}, exact, plain, what=f"gradient {i}, {site}, {rows} rows")
    return {"site": site, "rows": rows, "adapters": adapters, "rank": rank, "us": times(steps)}


@torch.no_grad()
def host(rows: int, adapters: int, device: str) -> dict:
    """What a call takes of Python, with each of our kernels: the calls are queued faster than they run."""
    case = Case("o", rows, adapters, 16, device, 1)
    took = {}
    for name in sorted(lora_add_.backends() & {"cuda", "triton"}) if device == "cuda" else ["cpu"]:
        with preferring(name):
            case.ours(0)
            rounds = []
            for _ in range(REPLAYS):
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    case.ours(0)
                rounds.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
                if device == "cuda":
                    torch.cuda.synchronize()
        took[name] = statistics.median(rounds)
    return {"rows": rows, "adapters": adapters, "us": took}


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """Calls as users make them, unforced, with these kernels."""
    with patch.object(lora_add_, "prefers_cuda", lambda *args: name == "cuda"):
        lora_add_.forget()
        yield
    lora_add_.forget()


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
    device = "gpu-" + slug(gpu)
    return {
        "device": device,
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": version("triton") if has_triton("low_rank") else "",
    }


def line(row: dict) -> str:
    """A case's row, to read."""
    own = row["providers"][OURS]["alone_us"]
    parts = [
        f"{row['site']} {row['rows']} {row['adapters']} {row['rank']} floor {row['floor_us']:.2f} "
        f"base {row['base_us']:.1f}",
        *(f"{name} {p['alone_us']:.2f} +{p['exposed_us']:.2f}" for name, p in row["providers"].items()),
        f"{row['floor_us'] / own:.0%} of roof",
        *(f"{name} not timed: {why}" for name, why in row.get("failed", {}).items()),
    ]
    return " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path, help="a folder of other projects' kernels, see peers.py")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: the path, no times")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.dry_run:
        torch.set_num_threads(1)  # tiny products gain nothing from more, and wait for each other on a busy machine
    end = time.monotonic() + options.seconds
    device, todo = "cpu" if options.dry_run else "cuda", list(cases(options.dry_run))
    peers, missing = load(options.peers) if options.peers else ({}, {})
    for name, why in missing.items():
        print(f"{name} is not timed: {why}", flush=True)
    result = {"machine_info": machine(), "datetime": str(datetime.now(timezone.utc)), "replays": REPLAYS,
              "roofs": roofs(), "missing_peers": missing, "left_out": len(todo),
              "cases": [], "plans": [], "training": [], "host": []}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(where: str, row: dict) -> None:
        result[where].append(row)
        (options.out / "gpu_low_rank.json").write_text(json.dumps(result, indent=1) + "\n")
        print(line(row) if where == "cases" else f"{where} {row}", flush=True)

    for which in todo:
        if time.monotonic() > end:
            print(f"{result['left_out']} cases are left out: the {options.seconds:.0f} s are over", flush=True)
            break
        layers = 2 if options.dry_run else 4 if which[1] > 256 else 12
        result["left_out"] -= 1
        keep("cases", measure(Case(*which, device, layers), result["roofs"]["read"], peers))
    for batch in PLANS:
        keep("plans", plan(*batch, device))
    keep("host", host(8, 8, device))
    for which in TRAINING:
        site, rows, *rest = which
        keep("training", training(site, min(rows, 64) if options.dry_run else rows, *rest, device))


if __name__ == "__main__":
    main()
