"""Which backend runs an op: pure functions of what is asked, so that they are tested without the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda", "sim")


@dataclass(frozen=True)
class Choice:
    """A backend and the reason it was taken, or why the one asked for can't be."""

    backend: str | None
    reason: str


def choose(
    device_type: str, available: frozenset[str], forced: str | None = None, *, interpreted: bool = False
) -> Choice:
    """The backend for tensors on ``device_type`` among those ``available`` for the op.

    A forced backend is taken or refused (``backend`` None), never replaced. ``interpreted``: Triton's interpreter is
    on, so that its kernels take CPU tensors when forced.
    """
    suits: tuple[str, ...] = {"cpu": ("cpu", "sim"), "cuda": ("cuda", "triton")}.get(device_type, ())
    if interpreted and device_type == "cpu" and forced == "triton":
        suits += ("triton",)
    if forced is not None:
        if forced not in BACKENDS:
            return Choice(None, f"no backend is called {forced!r}; there are {', '.join(BACKENDS)}")
        if forced != "reference" and forced not in suits:
            return Choice(None, f"backend {forced!r} does not run on {device_type} tensors")
        if forced not in available:
            return Choice(None, f"backend {forced!r} has no kernel for this op here")
        return Choice(forced, "forced")
    for name in suits:
        if name in available and name != "sim":
            return Choice(name, f"the fastest backend for {device_type} tensors here")
    missing = f"no {suits[0]} kernel here" if suits else f"no kernel for {device_type} tensors"
    return Choice("reference", missing)


@dataclass(frozen=True)
class Gpu:
    """What of a GPU decides tiles: its compute capability (0, 0 where it is none of NVIDIA's) and the bytes of shared
    memory a block may have.
    """

    capability: tuple[int, int] = (0, 0)
    shared: int = 64 * 1024


@dataclass(frozen=True)
class ShrinkTiles:
    """How the Triton shrink cuts its work.

    K is summed in ``chunks`` chunks of ``chunk``, which depend on K and the dtypes alone, since they are what decides a
    row's bits; ``split`` programs share them.
    """

    block_m: int
    block_k: int
    block_r: int
    chunk: int
    chunks: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandTiles:
    """How the Triton expand cuts its work; a program takes ``group`` blocks of columns in turn."""

    block_m: int
    block_n: int
    block_r: int
    group: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class OuterTiles:
    """How the Triton outer products cut their work."""

    block_p: int
    block_u: int
    block_w: int
    num_warps: int
    num_stages: int


def shrink_tiles(pairs: int, L: int, K: int, R: int, x: torch.dtype, factors: torch.dtype, gpu: Gpu) -> ShrinkTiles:
    """For ``pairs`` rows over ``L`` adapters of ``[R, K]``; sizes are those that were fastest on an H100."""
    half = x == factors != torch.float32
    block_k = 128 if half else 64
    block_r = min(max(_power_of_2(R), 16), 128 if half else 32)
    chunk = 256 if K <= 4096 else 512
    chunks = max(-(-K // chunk), 1)
    tall = pairs > 256 and pairs >= 32 * L
    # 64 rows only there: Triton 3.6 does not compile the loop for Blackwell's tensor cores.
    block_m = (64 if half and gpu.capability[0] == 9 else 32) if tall else 16
    stage = (block_m + block_r) * block_k * max(x.itemsize, factors.itemsize)
    return ShrinkTiles(
        block_m=block_m,
        block_k=block_k,
        block_r=block_r,
        chunk=chunk,
        chunks=chunks,
        # Not where the expand loops over blocks of ranks: its loads of all parts, pipelined, outgrow shared memory.
        split=chunks if pairs * R <= 32768 and not (tall and _expand_block_r(R, factors) < R) else 1,
        num_warps=4,
        num_stages=min(5 if half and tall else 3, max(gpu.shared // stage, 1)),
    )


def expand_tiles(pairs: int, L: int, R: int, factors: torch.dtype) -> ExpandTiles:
    """For ``pairs`` rows over ``L`` adapters of ``[N, R]``; sizes are those that were fastest on an H100."""
    block_r = _expand_block_r(R, factors)
    wider = 1 if factors == torch.bfloat16 else 2  # all others are multiplied as fp32 and would spill
    if pairs > 256 and pairs >= 32 * L:
        return ExpandTiles(block_m=32, block_n=64, block_r=block_r, group=8, num_warps=2 * wider, num_stages=3)
    return ExpandTiles(block_m=16, block_n=256, block_r=block_r, group=1, num_warps=4 * wider, num_stages=1)


def _expand_block_r(R: int, factors: torch.dtype) -> int:
    return min(max(_power_of_2(R), 16), 64 if factors == torch.bfloat16 else 32)


def outer_tiles(U: int, W: int) -> OuterTiles:
    """For results ``[U, W]``."""
    return OuterTiles(
        block_p=32,
        block_u=min(max(_power_of_2(U), 16), 64),
        block_w=min(max(_power_of_2(W), 16), 64),
        num_warps=4,
        num_stages=2,
    )


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
