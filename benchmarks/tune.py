"""Finds what ``lora_kernels.select`` can only know of a GPU by measuring it, and writes it as the device's settings.

    python benchmarks/tune.py --out DIR [--dry-run]

DIR gets ``<device>.json``, which belongs in ``kernels/configs/``: the fields of ``select.Gpu`` that made the batches of
this file fastest, each tried by itself while the others are as they were. A batch runs in a captured graph over layers
with factors of their own, all values in turns; the median of each value over the first one's decides.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_case import DECODE, PREFILL, SITES, Case
from gpu_low_rank import captured, times
from lora_kernels.kernels.configs import slug

from lora_kernels.ops._low_rank import lora_add_

LEAST = 0.99  # of the time now: what is faster by less stays as it is
SITES |= {f"{K}": (K, (K,)) for K in (512, 1024, 2048)}
# Each setting: the values to try, of which the first is the default, and the batches (site, rows, adapters, rank).
PROGRAMS = (512, 256, 1024, 2048), [("o", 512, 1, 16), ("o", 2048, 8, 16), ("gate_up", 2048, 8, 64)]
FORWARD = [("o", *batch, 16) for batch in (*DECODE, *PREFILL)] + [("gate_up", 64, 8, 16), ("gate_up", 2048, 8, 16)]
SMALL = [(str(K), 8, 8, rank) for K in (512, 1024, 2048) for rank in (8, 16)] + [("o", 8, 8, 8), ("o", 8, 8, 16)]


@contextmanager
def set_to(**values: int) -> Iterator[None]:
    """Launches inside are made for a GPU with these settings; nothing changes where there are none."""
    if not torch.cuda.is_available():
        yield
        return
    from lora_kernels.kernels.triton import _device

    gpu = _device.gpu

    def changed(device: torch.device) -> object:
        return dataclasses.replace(gpu(device), **values)

    with patch.object(_device, "gpu", changed):
        lora_add_.forget()
        try:
            yield
        finally:
            lora_add_.forget()


def seconds(which: tuple, setting: str, values: tuple[int, ...], dry: bool) -> list[float]:
    """The time of one batch with each value of a setting."""
    case = Case(*which, "cpu" if dry else "cuda", 2 if dry else 12)
    right, replays = case.checker(), {}
    for value in values:
        with set_to(**{setting: value}):
            call = case.ours if dry else functools.partial(case.by, "triton")
            right(str(value), call)
            replays[str(value)] = captured([functools.partial(call, i) for i in range(case.layers)])
    return list(times(replays).values())


def programs(dry: bool) -> int:
    """The value whose times are the shortest in the geometric mean."""
    values, batches = PROGRAMS
    ratios = [0.0] * len(values)
    for which in batches[:1] if dry else batches:
        took = seconds(which, "programs", values, dry)
        print(*which, *(f"programs {v}: {t:.2f}" for v, t in zip(values, took, strict=True)), flush=True)
        ratios = [r + math.log(t / took[0]) for r, t in zip(ratios, took, strict=True)]
    best = min(range(len(values)), key=ratios.__getitem__)
    return values[best] if ratios[best] / len(batches) < math.log(LEAST) else values[0]


def recompute(dry: bool) -> int:
    """The most bytes of A up to which one kernel beats two in every batch."""
    gains: dict[int, list[float]] = {}
    for which in SMALL[:1] if dry else SMALL:
        two, one = seconds(which, "recompute", (0, 1 << 30), dry)
        size = 2 * SITES[which[0]][0] * which[3]
        print(*which, f"A of {size} bytes, two kernels: {two:.2f}, one: {one:.2f}", flush=True)
        gains.setdefault(size, []).append(one / two)
    most = 0
    for size in sorted(gains):
        if not max(gains[size]) < LEAST:
            break
        most = size
    return most


def cuda(dry: bool) -> bool:
    """Whether the CUDA kernels beat Triton's over the batches of a server, in the geometric mean."""
    if not {"cuda", "triton"} <= lora_add_.backends() or dry:
        return False
    ratios = []
    for which in FORWARD:
        case = Case(*which, "cuda", 12 if which[1] <= 256 else 4)
        right, replays = case.checker(), {}
        for name in ("triton", "cuda"):
            call = functools.partial(case.by, name)
            right(name, call)
            replays[name] = captured([functools.partial(call, i) for i in range(case.layers)])
        took = times(replays)
        print(*which, *(f"{name}: {t:.2f}" for name, t in took.items()), flush=True)
        ratios.append(math.log(took["cuda"] / took["triton"]))
    return sum(ratios) / len(ratios) < math.log(LEAST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="one small batch each on the CPU: the path, no times")
    options = parser.parse_args()
    with torch.no_grad():
        found = {search.__name__: search(options.dry_run) for search in (programs, recompute, cuda)}
    name = "none" if options.dry_run else slug(torch.cuda.get_device_name())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}: {found}")


if __name__ == "__main__":
    main()
