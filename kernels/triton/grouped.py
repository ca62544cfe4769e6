"""What kernels over the rows of several adapters share: the plan that groups the rows, tiles of it, products, sums.

A plan table lists the pairs of a row and an adapter sorted by adapter (``lora_kernels.reference.low_rank`` describes
it). A tile is up to SIZE pairs of one adapter, so there are no padding rows and an adapter's factors are read once a
tile. A grid is sized by what a batch of its length can need at most; programs past the last tile leave after one look
at the plan. No value is read back on the host, so a captured graph serves any ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from . import _device
from ._repeat import launch

HEADER = tl.constexpr(3)  # of a plan table, besides its L offsets: P, L and the last offset


@triton.jit
def select(values, i):
    """values[i] of a tuple for an i known only at run time, a number or a tensor of them."""
    chosen = values[0]
    for j in tl.static_range(1, len(values)):
        chosen = tl.where(i == j, values[j], chosen)
    return chosen


@triton.jit
def run(plan, tile, pairs, L, SIZE: tl.constexpr, BLOCK_L: tl.constexpr, PLANNED: tl.constexpr):
    """(adapter, start, stop): whose pairs a tile is of, L where it is empty, and the places they have in the plan."""
    if PLANNED:
        # Adapter l has tile slots from start_l // SIZE + l on: enough, in order, and found without a prefix sum.
        adapter = -1
        for first in range(0, L, BLOCK_L):
            l = first + tl.arange(0, BLOCK_L)
            start = tl.load(plan + 2 + l, mask=l < L, other=0)
            adapter += tl.sum(((l < L) & (start // SIZE + l <= tile)).to(tl.int32))
        matches = (tl.load(plan + 1) == L) & (adapter >= 0)  # a plan of other adapters has none of these
        start = tl.load(plan + 2 + adapter, mask=matches, other=0)
        stop = tl.load(plan + 3 + adapter, mask=matches, other=0)
        start += (tile - start // SIZE - adapter) * SIZE
        adapter = tl.where(start < stop, adapter, L)
    else:
        adapter = tile * 0
        start = tile * SIZE
        stop = pairs
    return adapter, start, tl.minimum(stop, start + SIZE)


@triton.jit
def pairs_at(plan, position, stop, pairs, L, PLANNED: tl.constexpr):
    """(the pairs at places of a run, which of them exist); 0 for one that does not."""
    pair = position
    live = position < stop
    if PLANNED:
        pair = tl.load(plan + HEADER + L + position, mask=live, other=0)
        live &= (pair >= 0) & (pair < pairs)
    return tl.where(live, pair, 0).to(tl.int64), live


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, PARTS: tl.constexpr = 3):
    """acc + a b in fp32: 16-bit operands of one dtype as they are, others at fp32's precision.

    fp32 by bf16 is PARTS products of bf16, each of 8 more bits of the fp32 operand: 3 are all of it, 2 are enough where
    a 16-bit number comes of it.
    """
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    if a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high, rest = _bf16_part(b)
        middle, rest = _bf16_part(rest)
        if PARTS == 3:
            acc = tl.dot(a, rest.to(tl.bfloat16), acc)
        return tl.dot(a, high, tl.dot(a, middle, acc))
    if a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high, rest = _bf16_part(a)
        middle, rest = _bf16_part(rest)
        if PARTS == 3:
            acc = tl.dot(rest.to(tl.bfloat16), b, acc)
        return tl.dot(high, b, tl.dot(middle, b, acc))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def _bf16_part(t):
    """(t rounded to bf16, what is left of it)."""
    part = t.to(tl.bfloat16)
    return part, tl.where(tl.abs(t) < float("inf"), t - part.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=("pairs", "segments", "bits"))
def plan_kernel(
    table, ids, indptr, order, pairs, segments, bits, L,
    BLOCK: tl.constexpr, SEGMENTED: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """One program an adapter: counts the pairs of the adapters before it, then lists its own in order."""
    l = tl.program_id(0)
    lower = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        id_ = id_of(ids, indptr, first + tl.arange(0, BLOCK), pairs, segments, bits, SEGMENTED)
        lower += ((id_ >= 0) & (id_ < l)).to(tl.int32)
    start = tl.sum(lower)
    stop = start
    for first in range(0, pairs, BLOCK):
        position = first + tl.arange(0, BLOCK)
        id_ = id_of(ids, indptr, position, pairs, segments, bits, SEGMENTED)
        mine = (id_ == l) & (id_ < L)
        place = stop + tl.cumsum(mine.to(tl.int32)) - 1
        pair = position
        if ORDERED:
            pair = tl.load(order + position, mask=mine, other=0).to(tl.int32)
        tl.store(table + HEADER + L + place, pair, mask=mine)
        stop += tl.sum(mine.to(tl.int32))
    if l < L:
        tl.store(table + 2 + l, start)
    if l + 1 >= L:
        tl.store(table + 2 + L, stop)
        tl.store(table + 1, L)
        if SEGMENTED and not ORDERED:
            tl.store(table, tl.load(indptr + segments).to(tl.int32))
        else:
            tl.store(table, pairs)


@triton.jit
def id_of(ids, indptr, position, pairs, segments, bits, SEGMENTED: tl.constexpr):
    """The id at each position, -1 where there is none."""
    if SEGMENTED:
        low = tl.zeros_like(position)  # how many bounds lie at or before it, by bisection
        high = low + segments + 1
        for _ in range(bits):
            middle = (low + high) // 2
            bound = tl.load(indptr + middle, mask=middle <= segments, other=0)
            right = (low < high) & (bound <= position)
            high = tl.where(right, high, middle)
            low = tl.where(right, middle + 1, low)
        inside = (position < pairs) & (low >= 1) & (low <= segments)
        return tl.load(ids + low - 1, mask=inside, other=-1)
    return tl.load(ids + position, mask=position < pairs, other=-1)


@triton.jit(do_not_specialize=("rows", "count"))
def sum_kernel(
    out, parts, rows, columns, count, out_m, out_n, parts_c, parts_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[m] (+)= parts[0, m] + parts[1, m] + ..., in this order, rounded once."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (m < rows) & (n < columns)
    at = parts + m * parts_m + n
    acc = tl.load(at, mask=inside, other=0.0)
    for _ in range(1, count):
        at += parts_c
        acc += tl.load(at, mask=inside, other=0.0)
    out_at = out + m * out_m + n.to(tl.int64) * out_n
    if ADD:
        acc += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)


def write_plan(table: Tensor, ids: Tensor, indptr: Tensor | None, order: Tensor | None, num_adapters: int) -> None:
    """The plan of ``ids`` into ``table``, in one kernel."""
    ids = ids.reshape(-1).contiguous()
    segmented = indptr is not None
    segments = ids.numel()
    pairs = segments
    if order is not None:
        pairs = order.numel()
        order = order.contiguous()
    elif segmented:
        pairs = table.numel() - num_adapters - 3
    with _device.on(table):
        launch(
            plan_kernel, (max(num_adapters, 1),),
            table, ids, indptr.contiguous() if segmented else ids, or_else(order, ids),
            pairs, segments, (segments + 1).bit_length(), num_adapters,
            BLOCK=min(max(triton.next_power_of_2(pairs), 32), 1024), SEGMENTED=segmented, ORDERED=order is not None,
            num_warps=4, num_stages=1,
        )  # fmt: skip


def planned(pairs: int, L: int, ids, indptr, plan, like: Tensor) -> Tensor | None:
    """The plan's table: the one given, or of ids, or None where every row uses adapter 0."""
    if plan is not None or ids is None:
        return plan
    table = torch.empty(L + 3 + pairs, dtype=torch.int32, device=like.device)
    write_plan(table, ids, indptr, None, L)
    return table


def tiles(pairs: int, L: int, size: int, plan: Tensor | None) -> int:
    """The most tiles that ``pairs`` pairs of ``L`` adapters can make."""
    if plan is None:
        return triton.cdiv(pairs, size)
    return pairs // size + L


def block_l(L: int) -> int:
    """How many of a plan's offsets a program reads at a time."""
    return min(max(triton.next_power_of_2(L), 16), 1024)


def sum_into(out: Tensor, parts: Tensor, *, add: bool = False) -> None:
    """out ``[M, N]`` (+)= the sum of parts ``[C, M, N]`` (rows contiguous) over C, in order, rounded once."""
    rows, columns = out.shape
    if not out.numel():
        return
    block_n = min(triton.next_power_of_2(columns), 512)
    block_m = 1024 // block_n
    launch(
        sum_kernel, (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)),
        out, parts, rows, columns, parts.shape[0], *out.stride(), *parts.stride()[:2],
        BLOCK_M=block_m, BLOCK_N=block_n, ADD=add, num_warps=4, num_stages=1,
    )  # fmt: skip


def or_else(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that a kernel does not follow, where there is no tensor."""
    return other if tensor is None else tensor
