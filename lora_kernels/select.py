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
    device_type: str,
    available: frozenset[str],
    forced: str | None = None,
    *,
    interpreted: bool = False,
    cuda_first: bool = False,
) -> Choice:
    """The backend for tensors on ``device_type`` among those ``available`` for the op.

    A forced backend is taken or refused (``backend`` None), never replaced. ``interpreted``: Triton's interpreter is
    on, so that its kernels take CPU tensors when forced. ``cuda_first``: CUDA kernels are the faster ones.
    """
    gpu = ("cuda", "triton") if cuda_first else ("triton", "cuda")
    suits: tuple[str, ...] = {"cpu": ("cpu", "sim"), "cuda": gpu}.get(device_type, ())
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
    """What of a GPU decides tiles.

    Attributes:
        capability: its compute capability, (0, 0) where it is none of NVIDIA's.
        shared: the bytes of shared memory a block may have.
        programs: how many programs of an expand keep it busy.
        recompute: up to how many bytes of A each program of a small batch reads it whole, in one kernel, which saves
            the start of a second one; 0 = never.
        cuda: whether the CUDA kernels of ``low_rank`` are faster than Triton's, for bf16 factors.

    The last three are measured by ``benchmarks/tune.py``, which writes them to ``kernels/configs``.
    """

    capability: tuple[int, int] = (0, 0)
    shared: int = 64 * 1024
    programs: int = 512
    recompute: int = 0
    cuda: bool = False

    @property
    def amd(self) -> bool:
        """Whether it is none of NVIDIA's."""
        return self.capability == (0, 0)


@dataclass(frozen=True)
class ShrinkTiles:
    """How the Triton shrink cuts its work.

    K is summed in ``chunks`` chunks of ``chunk``, which depend on K and the dtypes alone, since they are what decides a
    row's bits; ``split`` programs share them. A program takes ``block_r`` ranks of one slice, or, where ``slices`` is
    more than 1, of all slices at once: a power of two.
    """

    block_m: int
    block_k: int
    block_r: int
    slices: int
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
    """How the Triton outer products cut their work; a tile is up to ``size`` pairs of one adapter."""

    size: int
    block_p: int
    block_u: int
    block_w: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandGradTiles:
    """How the Triton gradients of an expand cut their work; a tile is up to ``size`` pairs of one adapter.

    Not ``fused``: what a single pass over dy leaves in memory between its kernels costs more than a second pass.
    """

    fused: bool
    size: int
    block_p: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


def shrink_tiles(
    pairs: int,
    L: int,
    K: int,
    R: int,
    S: int,
    x: torch.dtype,
    factors: torch.dtype,
    gpu: Gpu,
    dropout: bool = False,
) -> ShrinkTiles:
    """For ``pairs`` rows over ``L`` adapters of ``S`` slices ``[R, K]``; sizes were the fastest on an H100.

    ``dropout``: of x, which takes registers.
    """
    half = x == factors != torch.float32
    block_k = 128 if half else 64
    block_r = min(max(_power_of_2(R), 16), (64 if dropout and gpu.amd else 128) if half else 32)
    chunk = 256 if K <= 4096 else max(_power_of_2(-(-K // 32)), 512)
    chunks = max(-(-K // chunk), 1)
    tall = _tall(pairs, L)
    # 64 rows only there: Triton 3.6 does not compile the loop for Blackwell's tensor cores.
    block_m = (64 if half and gpu.capability[0] == 9 else 32) if tall else 16
    # Many rows of x are worth reading once for all slices; few come from the cache, and more programs are better.
    # Not on AMD, where Triton has no pointers into several tensors side by side.
    # Nor of masters, whose parts take the registers.
    slices, most = _power_of_2(S), 128 if half else 32 if x == factors else 0
    together = slices if tall and not gpu.amd and block_r >= R and slices * block_r <= most else 1
    wide = tall and block_r > (64 if half and dropout else 128 if half else 16)  # too many registers for four warps
    stage = (block_m + together * block_r) * block_k * max(x.itemsize, factors.itemsize)
    return ShrinkTiles(
        block_m=block_m,
        block_k=block_k,
        block_r=block_r,
        slices=together,
        chunk=chunk,
        chunks=chunks,
        # Not where the expand loops over blocks of ranks: its loads of all parts, pipelined, outgrow shared memory.
        split=chunks if pairs * R <= 32768 and not (tall and _expand_block_r(R, factors) < R) else 1,
        num_warps=8 if wide or (together > 1 and (together * block_r > 64 or not half)) else 4,
        num_stages=min(5 if half and tall else 2 if wide else 3, max(gpu.shared // stage, 1)),
    )


def expand_tiles(pairs: int, L: int, N: int, R: int, terms: int, factors: torch.dtype, gpu: Gpu) -> ExpandTiles:
    """For ``pairs`` rows over ``L`` adapters of ``[N, R]``, ``terms`` of them summed into each column.

    Sizes are those that were fastest on an H100, for one term.
    """
    block_r = _expand_block_r(R, factors)
    wider = 1 if factors == torch.bfloat16 and block_r >= R else 2  # all others take twice the registers
    if not _tall(pairs, L):
        return ExpandTiles(block_m=16, block_n=256, block_r=block_r, group=1, num_warps=4 * wider, num_stages=1)
    blocks = (pairs // 32 + L) * (N // 64)
    return ExpandTiles(
        block_m=32,
        block_n=64,
        block_r=block_r,
        group=next((group for group in (8, 4) if blocks >= gpu.programs * group), 2),
        num_warps=(2 if terms == 1 else 4) * wider,
        num_stages=2 if terms > 1 or factors == torch.float16 else 3,
    )


def makes_v_again(pairs: int, L: int, K: int, R: int, x: torch.dtype, factors: torch.dtype, gpu: Gpu) -> bool:
    """Whether one kernel adds all, each program making v for itself, instead of a shrink and an expand."""
    small = 0 < K * R * factors.itemsize <= gpu.recompute
    return small and not _tall(pairs, L) and x == factors and _expand_block_r(R, factors) >= R


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a GPU runs what is compiled for ``architectures``.

    ``sm_90`` is machine code for its generation from that capability on, ``compute_90`` is PTX for all from there on.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        least = divmod(int("".join(filter(str.isdigit, number))), 10)
        if least <= capability and (kind == "compute" or least[0] == capability[0]):
            return True
    return False


def cuda_is_faster(factors: torch.dtype, gpu: Gpu) -> bool:
    """Whether a ``low_rank`` op takes the CUDA kernel where Triton has one too.

    Never by the batch: each kernel sums in an order of its own, and a row's bits may not depend on other rows.
    """
    return gpu.cuda and factors == torch.bfloat16


def outgrows_cuda(R: int, factors: torch.dtype, gpu: Gpu) -> bool:
    """Whether the CUDA expand has no room for 64 columns of B and 16 rows of v of all ranks."""
    ranks = -(-R // 16) * 16
    return 64 * (ranks * factors.itemsize + 2) + 16 * (ranks + 8) * 4 > gpu.shared


def _tall(pairs: int, L: int) -> bool:
    """Whether an adapter has rows enough for tall tiles."""
    return pairs > 256 and pairs >= 32 * L


def _expand_block_r(R: int, factors: torch.dtype) -> int:
    return min(max(_power_of_2(R), 16), 64 if factors == torch.bfloat16 else 32)


def outer_tiles(U: int) -> OuterTiles:
    """For results of ``U`` rows: tiles long enough for their partial results to be few beside what they read."""
    block_u = min(max(_power_of_2(U), 16), 128)
    return OuterTiles(
        size=512 if block_u <= 64 else 1024,
        block_p=32,
        block_u=block_u,
        block_w=min(8192 // block_u, 256),
        num_warps=8,
        num_stages=2,
    )


def expand_grad_tiles(
    R: int, dy: torch.dtype, factors: torch.dtype, gpu: Gpu, columns: bool = False
) -> ExpandGradTiles:
    """For dy of any width and factors of rank ``R``; ``columns``: with sums over its columns beside."""
    half = dy == factors != torch.float32
    block_r = min(max(_power_of_2(R), 16), 64)
    return ExpandGradTiles(
        fused=(16 if gpu.amd else 32) >= R and dy != torch.float16,
        size=512 if block_r == 16 else 1024,
        block_p=32,
        block_n=(256 if half else 128) // (2 if columns and (block_r > 16 or not half) else 1),
        block_r=block_r,
        num_warps=8,
        num_stages=2,
    )


@dataclass(frozen=True)
class InGradTiles:
    """How the Triton gradients that enter x cut their work: up to ``size`` rows a program, ``block_m`` at a time."""

    size: int
    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


def in_grad_tiles(rows: int, K: int, R: int, x: torch.dtype, factors: torch.dtype, gpu: Gpu) -> InGradTiles:
    """For dx and x ``[rows, K]`` and an adapter of rank ``R``: what leaves registers for two programs at a time."""
    half = x == factors == torch.bfloat16  # all others take twice the registers
    block_r = min(max(_power_of_2(R), 16), 64 if half else 32)
    block_k = 64 if gpu.amd else (4096 if half else 2048) // block_r
    return InGradTiles(
        size=gradient_rows(rows, -(-K // block_k), 512 if block_r == 16 else 1024, gpu),
        block_m=32 if gpu.amd else 16,
        block_k=block_k,
        block_r=block_r,
        num_warps=8 if block_k == 256 or (x == torch.float32 and not gpu.amd) else 4,
        num_stages=1 if gpu.amd else 2,
    )


def gradient_rows(rows: int, blocks: int, most: int, gpu: Gpu) -> int:
    """Up to how many rows a program of a gradient takes, of ``blocks`` of columns: fewer where programs are few."""
    size = most
    while size > 64 and -(-rows // size) * blocks * 4 < gpu.programs:
        size //= 2
    return size


@dataclass(frozen=True)
class QuantizedTiles:
    """How a Triton product with a packed weight cuts its work.

    ``one_group``: a block of ``block_k`` is all of one group, whose scale is read once. ``split`` programs share a sum,
    ``steps`` blocks each.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    one_group: bool
    split: int
    steps: int
    num_warps: int
    num_stages: int


def quantized_tiles(
    rows: int, N: int, K: int, group: int, x: torch.dtype, factors: torch.dtype, gpu: Gpu
) -> QuantizedTiles:
    """For y ``[rows, N]`` of x ``[rows, K]``, summed over K."""
    half = x != torch.float32
    block_k, one_group = _within_groups(group, K, 64 if half else 32)
    block_m = 16 if rows <= 16 else 64 if rows <= 64 or not half else 128
    block_n = 128 if block_m == 128 else 64
    split, steps = _split(rows, K, block_k, -(-rows // block_m) * -(-N // block_n), gpu)
    return QuantizedTiles(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        block_r=32 if factors == torch.bfloat16 else 16,
        one_group=one_group,
        split=split,
        steps=steps,
        num_warps=8 if block_m == 128 else 4,
        num_stages=2 if gpu.amd else 4 if block_m == 16 else 3,
    )


def quantized_grad_tiles(
    rows: int, N: int, K: int, group: int, dy: torch.dtype, factors: torch.dtype, gpu: Gpu
) -> QuantizedTiles:
    """For dx ``[rows, K]`` of dy ``[rows, N]``, summed over N."""
    half = dy != torch.float32
    block_k, one_group = _within_groups(group, K, 64)
    block_m = 64 if rows <= 64 or not half else 128
    block_n = 64 if half else 32
    split, steps = _split(rows, N, block_n, -(-rows // block_m) * -(-K // block_k), gpu)
    return QuantizedTiles(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        block_r=32 if factors == torch.bfloat16 else 16,
        one_group=one_group,
        split=split,
        steps=steps,
        num_warps=8 if block_m == 128 else 4,
        num_stages=2 if gpu.amd else 3,
    )


@dataclass(frozen=True)
class DequantizeTiles:
    """How the Triton dequantisation cuts its work; ``one_group`` as of :class:`QuantizedTiles`."""

    block_m: int
    block_k: int
    one_group: bool
    num_warps: int


def dequantize_tiles(columns: int, group: int) -> DequantizeTiles:
    """For the first ``columns`` columns of a weight, in blocks that begin at multiples of ``block_k``."""
    block_k, one_group = _within_groups(group, columns, 128)
    return DequantizeTiles(block_m=2048 // block_k, block_k=block_k, one_group=one_group, num_warps=4)


def _within_groups(group: int, columns: int, most: int) -> tuple[int, bool]:
    """(a power of two from 32 to ``most``, whether a block of it never has two groups)."""
    size = most if group >= columns else min(group & -group, most)
    return (size, True) if size >= 32 else (most, False)


def _split(rows: int, length: int, block: int, programs: int, gpu: Gpu) -> tuple[int, int]:
    """(how many programs share a sum of ``length``, how many blocks each takes): four or more.

    No more than the GPU needs to be busy, nor than leave in memory a few times what the weight takes.
    """
    blocks = -(-length // block)
    split = max(min(gpu.programs // programs, blocks // 4, length // (8 * rows)), 1)
    steps = -(-blocks // split)
    return -(-blocks // steps), steps


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
