"""What the machine can do at best, measured in turns with what it is compared to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from machine import last_level_cache

CHUNK = 64 << 20  # bytes that a probe of memory moves
SQUARE = {torch.bfloat16: 4096, torch.float32: 2048}  # sizes of a matrix product that takes some 0.1 s


def timed(call: Callable[[], object]) -> float:
    """Seconds that ``call`` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def beyond_cache() -> int:
    """Bytes that do not fit in any cache of the machine together with what else is used."""
    return max(512 << 20, 3 * last_level_cache())


@dataclass(frozen=True)
class Work:
    """The least that a computation must do: floating-point operations in ``dtype``, bytes read and written."""

    flops: int
    bytes: int
    dtype: torch.dtype = torch.bfloat16


class Roofs:
    """Probes by name: ``read`` and ``copy`` of memory, matrix products in ``bfloat16`` and ``float32``.

    Memory is a buffer beyond the last-level cache, visited in order, with all of torch's threads.
    """

    def __init__(self) -> None:
        self.chunks = torch.ones(beyond_cache() // CHUNK, CHUNK // 4)
        self.at = 0
        self.squares = {dtype: torch.randn(n, n).to(dtype) for dtype, n in SQUARE.items()}
        self.amounts = {"read": CHUNK, "copy": 2 * CHUNK} | {_name(d): 2 * n**3 for d, n in SQUARE.items()}

    def probe(self, name: str) -> float:
        """Seconds of one probe."""
        if name == "read":
            return timed(self._next().sum)
        if name == "copy":
            source, target = self._next(), self._next()
            return timed(lambda: target.copy_(source))
        square = self.squares[getattr(torch, name)]
        return timed(lambda: torch.mm(square, square))

    def evict(self) -> None:
        """Read so much that nothing else is left in the caches."""
        for _ in range(1 + 2 * last_level_cache() // CHUNK):
            self._next().sum()

    def _next(self) -> torch.Tensor:
        self.at = (self.at + 1) % len(self.chunks)
        return self.chunks[self.at]

    def rates(self, times: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Bytes or FLOPs a second of the probes with these times: medians."""
        return {name: self.amounts[name] / statistics.median(taken) for name, taken in times.items()}


def bound(work: Work, rates: Mapping[str, float]) -> float:
    """Seconds below which ``work`` can't be done: FLOPs / rate + bytes / bandwidth, the better one measured."""
    bandwidth = max(rates[name] for name in ("read", "copy") if name in rates)
    return work.flops / rates[_name(work.dtype)] + work.bytes / bandwidth


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
