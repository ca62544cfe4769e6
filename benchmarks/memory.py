"""What a computation takes of memory, beyond what is in use before it."""

from __future__ import annotations

import ctypes
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

PROC = Path("/proc/self")


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest block that torch's CPU allocator gives while ``run`` runs, and of the most at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        taken.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    events = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    largest = peak = held = 0
    for _, size in events:
        held += size
        largest, peak = max(largest, size), max(peak, held)
    return largest, peak


def resident(run: Callable[[], object]) -> int | None:
    """The most bytes of the process that are in memory while ``run`` runs, where Linux says; any allocator's."""
    if not (PROC / "clear_refs").exists():
        return None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is taken
    (PROC / "clear_refs").write_text("5")  # what the peak is counted from
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    (line,) = [line for line in (PROC / "status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024
