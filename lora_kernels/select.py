"""Which backend runs an op: pure functions of what is asked, so that they are tested without the device."""

from __future__ import annotations

import math
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


def spectral_route(rows: int, n: int, shape: tuple[int, int], kind: str, device: str) -> str:
    """Whether x ΔWᵀ goes by transformed rows of x (``activation``) or by ΔW itself (``weight``).

    A coefficient takes one multiply-add a row of x in place of ΔW's N K / n, each as slow as ``slower`` of them in a
    dense product; ΔW is built once for all rows.
    """
    N, K = shape
    slower = 4 if device == "cpu" else 240
    return "weight" if n * slower > N * K and rows * n > 4 * N * K else "activation"


@dataclass(frozen=True)
class HadamardStage:
    """Some of a Hadamard matrix's factors, which one kernel multiplies rows with.

    Bases of ``orders`` and Sylvester's matrix of ``power`` are one dense matrix, from the left; Sylvester's of order
    ``right``, the last factor of all, comes from the right; 1 = none.
    """

    orders: tuple[int, ...]
    power: int
    right: int


def hadamard_stages(orders: tuple[int, ...], power: int) -> tuple[HadamardStage, ...]:
    """Of H₁ ⊗ H₂ ⊗ ... ⊗ H_{power}: one, or more where a dense matrix were larger than 512."""
    bases = math.prod(orders)
    right = min((1, 16, 32, 64), key=lambda q: (power % q, bases * power // q + 2 * q, -q))
    factors: list[tuple[tuple[int, ...], int]] = [((order,), 1) for order in orders]
    exponent = (power // right).bit_length() - 1
    while exponent:
        part = -(-exponent // -(-exponent // 8))
        factors.append(((), 1 << part))
        exponent -= part
    stages, size = [HadamardStage((), 1, right)], 1
    for order, factor in reversed(factors):
        size *= math.prod(order) * factor
        first = stages[0]
        if size > 512 and (first.orders or first.power > 1):
            size = math.prod(order) * factor
            stages.insert(0, HadamardStage(order, factor, 1))
        else:
            stages[0] = HadamardStage(order + first.orders, factor * first.power, first.right)
    return tuple(stages)


@dataclass(frozen=True)
class HadamardTiles:
    """How a stage cuts its work.

    A program has ``block_i`` rows of its dense matrix, ``block_j`` columns at a time, and ``block_q`` numbers after
    each of those that the matrix sums, of ``block_m`` rows.
    """

    block_i: int
    block_j: int
    block_m: int
    block_q: int
    num_warps: int
    num_stages: int


def hadamard_tiles(L: int, Q: int, right: int, x: torch.dtype, y: torch.dtype, gpu: Gpu) -> HadamardTiles:
    """For rows of ``L Q`` numbers, a dense matrix of order ``L`` and ``right``, a stage's, from x to y."""
    half = torch.float32 not in (x, y)
    block_i = min(max(_power_of_2(L), 16), 128 if half and -L % 128 < 64 and right > 1 else 64)
    block_q = right if right > 1 else 1 if Q == 1 else min(max(_power_of_2(Q), 16), 128)
    block_j = min(max(_power_of_2(L), 16), 32)
    stage = block_j * (2 * block_i + x.itemsize * 128)
    return HadamardTiles(
        block_i=block_i,
        block_j=block_j,
        block_m=128 // block_q,
        block_q=block_q,
        num_warps=8 if block_i > (64 if half else 32) else 4,
        num_stages=min(3, max((gpu.shared - 2 * right * right) // stage // 2, 1)),
    )


@dataclass(frozen=True)
class TrigonometricTiles:
    """How a trigonometric transform of N1 · ``N2`` numbers cuts its work.

    A program has ``block_m`` rows, ``block_i`` of the first product's frequencies at a time, and ``block_j`` of the
    rows' N1. ``gather``: the first product's cosines are too many to be kept, and found in a list of N1.
    """

    N2: int
    gather: bool
    block_m: int
    block_i: int
    block_j: int
    block_q: int
    num_warps: int
    num_stages: int


def trigonometric_tiles(N: int, x: torch.dtype, transpose: bool, gpu: Gpu) -> TrigonometricTiles:
    """For rows of ``N``, in the two factors that take the fewest multiply-adds."""
    half, hopper = x != torch.float32, gpu.capability[0] == 9
    # More takes too many registers, or on Blackwell tensor memory.
    most = 64 if half and gpu.capability >= (9, 0) else 32
    tallest = 64 if half and hopper and not transpose else 32 if half or not transpose else 16
    divisors = [n for n in range(1, min(most, N) + 1) if N % n == 0]
    N2 = min(divisors, key=lambda n: (_multiply_adds(N // n, n, tallest), n))
    N1, block_q = N // N2, _block_q(N2)
    block_i = _block_i(N1, tallest)
    block_m = 64 if N2 == 1 else max((32 if transpose else 64) // max(block_i, block_q), 1)
    area = 8192 if half and hopper else 4096
    return TrigonometricTiles(
        N2=N2,
        gather=N1 > 1024,
        block_m=block_m,
        block_i=block_i,
        block_j=min(max(_power_of_2(N1), 16), area // (block_m * block_q) if transpose else 32),
        block_q=block_q,
        num_warps=8 if transpose or block_q in (1, 64) or not half else 4,
        num_stages=1 if gpu.amd or transpose else 2,
    )


def _multiply_adds(N1: int, N2: int, tallest: int) -> int:
    """Of the two products for a row of N1 · N2, in whole blocks."""
    block_q, block_i = _block_q(N2), _block_i(N1, tallest)
    return -(-(N1 // 2 + 1) // block_i) * block_i * block_q * (2 * N1 + (4 * block_q if N2 > 1 else 0))


def _block_q(N2: int) -> int:
    return 1 if N2 == 1 else max(_power_of_2(N2), 16)


def _block_i(N1: int, tallest: int) -> int:
    """Of 16, 32 and 64 what takes the least time for N1 / 2 + 1 rows, where each block costs eight more."""
    sizes = [block for block in (64, 32, 16) if block <= tallest]
    return min(sizes, key=lambda block: -(-(N1 // 2 + 1) // block) * (block + 8))


@dataclass(frozen=True)
class HaarTiles:
    """``levels`` of a Haar transform from ``level`` on in a kernel: ``block_m`` rows of ``block`` numbers a program."""

    level: int
    levels: int
    block_m: int
    block: int
    num_warps: int


def haar_tiles(N: int, levels: int) -> tuple[HaarTiles, ...]:
    """For ``levels`` levels of rows of ``N``: one for each eleven of them."""
    tiles = []
    for level in range(0, levels, 11):
        here = min(levels - level, 11)
        block = max(min(_power_of_2(-(-N >> level)), 1024), 1 << here)
        tiles.append(HaarTiles(level, here, max(2048 // block, 1), block, 4))
    return tuple(tiles)


@dataclass(frozen=True)
class SpectralTiles:
    """How the Triton product with a sparse spectrum S cuts its work.

    A program takes ``block_m`` rows of x and ``block_r`` of S, ``block_e`` entries of each at a time. ``blocked``: of a
    copy of x that has ``block_m`` rows side by side.
    """

    block_m: int
    blocked: bool
    block_r: int
    block_e: int
    num_warps: int


def spectral_tiles(rows: int, length: int, entries: int, features: int) -> SpectralTiles:
    """For ``rows`` rows of ``features`` numbers and ``length`` rows of S, which have ``entries`` entries.

    ``features``: the most, where several products read rows of x and y in one layout.
    """
    block_m, blocked = _spectral_rows(rows, entries, features)
    dense = entries >= 4 * length
    return SpectralTiles(
        block_m=block_m,
        blocked=blocked,
        block_r=(16 if block_m == 32 else 8) if dense else 128 if block_m == 1 else 64,
        block_e=256 // max(block_m, 8) if dense else 1,
        num_warps=4,
    )


@dataclass(frozen=True)
class SpectralDotTiles:
    """How the Triton gradients of a sparse spectrum's entries cut their work.

    A program takes ``block_e`` entries and ``steps`` blocks of ``block_m`` rows, one of ``chunks`` parts of all rows.
    """

    block_m: int
    blocked: bool
    block_e: int
    chunks: int
    steps: int
    num_warps: int


def spectral_dot_tiles(rows: int, entries: int, features: int, gpu: Gpu) -> SpectralDotTiles:
    """For ``rows`` rows in the layout that :func:`spectral_tiles` says; parts of four blocks or more.

    Programs wait for memory most of the time, so a GPU holds several times those that would keep it busy otherwise.
    """
    block_m, blocked = _spectral_rows(rows, entries, features)
    block_e = 256 if block_m == 1 else 64
    blocks = -(-rows // block_m)
    chunks = max(min(4 * gpu.programs // -(-entries // block_e), blocks // 4), 1)
    steps = -(-blocks // chunks)
    return SpectralDotTiles(
        block_m=block_m,
        blocked=blocked,
        block_e=block_e,
        chunks=-(-blocks // steps),
        steps=steps,
        num_warps=4,
    )


def _spectral_rows(rows: int, entries: int, features: int) -> tuple[int, bool]:
    """(how many rows a program takes at a time, whether of a copy with their numbers side by side).

    By itself a number that an entry reads takes 32 bytes of the cache's bandwidth, among its like 4; the copy takes
    some 16 of it for each number of the rows, and the start of a kernel.
    """
    blocked = rows > 1 and rows * (2 * entries - features) > 1 << 20
    return (1 if rows == 1 else 16 if rows <= 16 or not blocked else 32), blocked
