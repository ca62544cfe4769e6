"""What every ``low_rank`` call must satisfy, said in words a user can act on.

The compiled kernels refuse the same calls before they write anything, but in one line; these functions then say which
argument was wrong, what it was and what was expected. Where no compiled kernel runs they run first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _env
from ..reference.low_rank import is_packed, num_adapters, num_slices, padded_rank

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
MAX_RANK = 512


def shape(t: Tensor) -> str:
    """``[2, 3]`` for messages."""
    return "[" + ", ".join(map(str, t.shape)) + "]"


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def floating(name: str, value: Any) -> None:
    """A tensor in fp32, bf16 or fp16; fp64 too, which only the reference takes."""
    tensor(name, value)
    if value.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {value.dtype}")


def same_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x on {x.device}")


def readable(t: Tensor) -> bool:
    """Whether reading the values costs no synchronisation (or was asked for) and is possible at all."""
    if torch.compiler.is_compiling() or isinstance(t, FakeTensor) or t.device.type == "meta":
        return False
    return t.device.type == "cpu" or _env.check()


def ids(ids: Any, name: str, L: int) -> None:
    """int32 or int64 ids, each from -1 to L - 1."""
    tensor(name, ids)
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"{name} must be [M] or [M, k], got {shape(ids)}")
    if readable(ids) and ids.numel():
        wrong = ((ids < -1) | (ids >= L)).reshape(-1).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            raise IndexError(f"{name}[{at}] is {int(ids.reshape(-1)[at])}, out of range for {L} adapters (-1 = none)")


def segments(seg_indptr: Any, adapter_ids: Any, L: int, rows: int | None = None) -> int:
    """Segment bounds that start at 0, never fall and end at or before ``rows``; returns their end."""
    tensor("seg_indptr", seg_indptr)
    ids(adapter_ids, "adapter_ids", L)
    if seg_indptr.dtype not in INTEGERS:
        raise TypeError(f"seg_indptr must be int32 or int64, got {seg_indptr.dtype}")
    if seg_indptr.dtype != adapter_ids.dtype:
        raise TypeError(f"seg_indptr is {seg_indptr.dtype}, adapter_ids {adapter_ids.dtype}; they must be the same")
    if adapter_ids.dim() != 1 or seg_indptr.shape != (adapter_ids.shape[0] + 1,):
        raise ValueError(
            f"seg_indptr must be [n_seg + 1] for adapter_ids [n_seg], got {shape(seg_indptr)} and {shape(adapter_ids)}"
        )
    if seg_indptr.device != adapter_ids.device:
        raise ValueError(f"seg_indptr is on {seg_indptr.device}, adapter_ids on {adapter_ids.device}")
    if rows is not None and not readable(seg_indptr):
        return rows
    bounds = seg_indptr.tolist()
    if bounds[0] != 0:
        raise ValueError(f"seg_indptr must start at 0, got {bounds[0]}")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(f"seg_indptr must not fall, got {a} then {b} at {i}")
    if rows is not None and bounds[-1] > rows:
        raise ValueError(f"seg_indptr ends at row {bounds[-1]}, x has {rows}")
    return bounds[-1]


def permutation(name: str, order: Any, count: int, ids: Tensor) -> None:
    """Each of ``count`` numbers from 0 on once."""
    tensor(name, order)
    if order.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {order.dtype}")
    if order.shape != (count,):
        raise ValueError(f"{name} must be [{count}], a place for each row, got {shape(order)}")
    if order.device != ids.device:
        raise ValueError(f"{name} is on {order.device}, adapter_ids on {ids.device}")
    if readable(order) and not torch.equal(order.long().sort().values, torch.arange(count, device=order.device)):
        raise ValueError(f"{name} must hold each of 0..{count - 1} once")


def factors(name: str, value: Sequence[Tensor], x: Tensor, form: str) -> None:
    """S stacked tensors or L matrices, one dtype, x's device."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be {form}, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must be {form}, got none")
    for i, t in enumerate(value):
        label = name if len(value) == 1 else f"{name}[{i}]"
        floating(label, t)
        same_device(label, t, x)
        if t.dim() not in (2, 3) or t.dim() != value[0].dim():
            raise ValueError(f"{label} must be {form}, got {shape(t)}")
        if t.dtype != value[0].dtype:
            raise TypeError(f"{label} is {t.dtype}, {name}[0] {value[0].dtype}; they must be the same")


def routing(rows: int, L: int, adapter_ids: Any, indptr: Any, plan: Tensor | None, weights: Any, x: Tensor) -> None:
    """Ids, segments or a plan that fit the rows, and the weights of a mixture."""
    k = 1
    if plan is not None:
        same_device("plan", plan, x)
        if plan.numel() < L + 3:
            raise ValueError(f"the plan is of at most {plan.numel() - 3} adapters, A and B hold {L}")
        if readable(plan):
            pairs, of = plan[:2].tolist()
            if of != L:
                raise ValueError(f"the plan is of {of} adapters, A and B hold {L}")
            k = weights.shape[-1] if isinstance(weights, Tensor) and weights.dim() == 2 else 1
            if pairs != rows * k and (k > 1 or pairs > rows):
                raise ValueError(
                    f"the plan is of {pairs} rows, x has {rows}" + (f" of {k} adapters each" if k > 1 else "")
                )
    elif indptr is not None:
        segments(indptr, adapter_ids, L, rows)
        same_device("seg_indptr", indptr, x)
    elif adapter_ids is not None:
        ids(adapter_ids, "adapter_ids", L)
        same_device("adapter_ids", adapter_ids, x)
        if adapter_ids.shape[0] != rows:
            raise ValueError(f"adapter_ids has {adapter_ids.shape[0]} entries, x has {rows} rows")
        k = adapter_ids.shape[1] if adapter_ids.dim() == 2 else 1
        if adapter_ids.dim() == 2 and weights is None:
            raise ValueError(f"adapter_ids {shape(adapter_ids)} is a mixture and needs weights {shape(adapter_ids)}")
    if weights is not None:
        floating("weights", weights)
        same_device("weights", weights, x)
        if weights.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weights must be float32, got {weights.dtype}")
        if (
            weights.dim() != 2
            or weights.shape[0] != rows
            or (adapter_ids is not None and weights.shape != adapter_ids.shape)
        ):
            raise ValueError(f"weights must be [M, k] as adapter_ids, here [{rows}, {k}], got {shape(weights)}")


def per_adapter(name: str, value: Any, dtype: torch.dtype, S: int, L: int, x: Tensor) -> None:
    """A tensor [L] or [S, L] of one dtype, or None."""
    if value is None:
        return
    tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {value.dtype}")
    if value.shape not in ((L,), (S, L)):
        raise ValueError(f"{name} must be [{L}] or [{S}, {L}] for {S} slices of {L} adapters, got {shape(value)}")
    same_device(name, value, x)


def ranks_within(ranks: Any, S: int, L: int, R: int, x: Tensor) -> None:
    per_adapter("ranks", ranks, torch.int32, S, L, x)
    if ranks is not None and readable(ranks) and ranks.numel():
        wrong = ((ranks < 0) | (ranks > R)).reshape(-1).nonzero()
        if wrong.numel():
            raise ValueError(f"ranks must lie in 0..{R}, got {int(ranks.reshape(-1)[wrong[0]])}")


def output(y: Any, rows: int, N: int, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """y [..., N] with a row for each row of x, every element at an address of its own."""
    floating("y", y)
    same_device("y", y, x)
    if y.dtype not in dtypes:
        raise TypeError(f"y must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {y.dtype}")
    if y.dim() == 0 or y.shape[-1] != N:
        raise ValueError(f"y must be [..., {N}] (the out features of B), got {shape(y)}")
    if y.numel() != rows * N:
        raise ValueError(f"y {shape(y)} must have {rows} rows, as x has")
    if any(stride == 0 and size > 1 for stride, size in zip(y.stride(), y.shape, strict=True)):
        raise ValueError(f"y {shape(y)} is expanded: several of its elements share one address, so it can't be written")


def shrink(
    x: Any, A: Sequence[Tensor], adapter_ids: Any, indptr: Any, plan: Any, ranks: Any, pairs: int, weights: Any = None
) -> int:
    """The arguments of a shrink; returns M."""
    rows = _into_A(x, A, adapter_ids, indptr, plan, weights)
    _rank("A", padded_rank(A))
    ranks_within(ranks, num_slices(A), num_adapters(A), padded_rank(A), x)
    return rows


def _into_A(x: Any, A: Sequence[Tensor], adapter_ids: Any, indptr: Any, plan: Any, weights: Any) -> int:
    """x, A in any form and which rows use which adapter; returns M."""
    floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a scalar")
    factors("A", A, x, "[L, R, K], or a tuple of those")
    L, K = num_adapters(A), x.shape[-1]
    for i, a in enumerate(A):
        if a.shape[-1] != K or (a.dim() == 3 and a.shape[:2] != A[0].shape[:2]):
            expected = f"[{L}, {A[0].shape[1]}, {K}]" if a.dim() == 3 else f"[r, {K}]"
            raise ValueError(f"A{f'[{i}]' if len(A) > 1 else ''} must be {expected} for x [..., {K}], got {shape(a)}")
    if A[0].dtype not in (x.dtype, torch.float32) and x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"A must be {x.dtype} as x or float32, got {A[0].dtype}")
    rows = x.numel() // K if K else x.shape[:-1].numel()
    routing(rows, L, adapter_ids, indptr, plan, weights, x)
    return rows


def _rank(name: str, rank: int) -> None:
    if rank > MAX_RANK:
        raise ValueError(f"{name} has rank {rank}, more than the {MAX_RANK} supported")


def add(
    y: Any,
    x: Any,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    adapter_ids: Any,
    indptr: Any,
    plan: Any,
    scaling: Any,
    ranks: Any,
    weights: Any,
    scale: float,
) -> None:
    """The arguments of y += s (x Aᵀ) Bᵀ."""
    rows, N = adapters(x, A, B, adapter_ids, indptr, plan, scaling, ranks, weights)
    output(y, rows, N, x, (x.dtype, torch.float32) if x.dtype != torch.float64 else (x.dtype,))


def adapters(
    x: Any,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    adapter_ids: Any,
    indptr: Any,
    plan: Any,
    scaling: Any,
    ranks: Any,
    weights: Any,
) -> tuple[int, int]:
    """All of s (x Aᵀ) Bᵀ but what it is added to; returns (M, ΣN)."""
    rows = _into_A(x, A, adapter_ids, indptr, plan, weights)
    if A[0].dtype not in (x.dtype, torch.float32):
        raise TypeError(f"A must be {x.dtype} as x or float32, got {A[0].dtype}")
    factors("B", B, x, "[L, N, R], or a tuple of those")
    L, S = num_adapters(A), num_slices(A)
    if is_packed(A, B):
        A = _unpacked_shapes(A[0], B, ranks)
    _rank("A", padded_rank(A))
    ranks_within(ranks, S, L, padded_rank(A), x)
    S = num_slices(B)
    if len(B) != len(A) or B[0].dim() != A[0].dim():
        raise ValueError(
            f"A and B must come in the same form, got {len(A)} of {shape(A[0])} and {len(B)} of {shape(B[0])}"
        )
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        listed = b.dim() == 2
        fits = b.shape[-1] == a.shape[-2] and (b.shape[0] == B[0].shape[0] if listed else b.shape[0] == L)
        if not fits:
            expected = f"[{B[0].shape[0]}, {a.shape[0]}]" if listed else f"[{L}, N, {a.shape[1]}]"
            raise ValueError(f"B{f'[{i}]' if len(B) > 1 else ''} must be {expected} for A {shape(a)}, got {shape(b)}")
    if B[0].dtype != A[0].dtype:
        raise TypeError(f"B must be {A[0].dtype} as A, got {B[0].dtype}")
    N = sum(b.shape[1] for b in B) if B[0].dim() == 3 else B[0].shape[0]
    per_adapter("scaling", scaling, torch.float32, S, L, x)
    return rows, N


def _unpacked_shapes(A: Tensor, B: Sequence[Tensor], ranks: Any) -> Sequence[Tensor]:
    """A packed A as one of its slices, S times."""
    R = A.shape[1] // len(B)
    if A.shape[1] != len(B) * B[0].shape[-1]:
        raise ValueError(
            f"A must be [{A.shape[0]}, {len(B)} * {B[0].shape[-1]}, K], the slices of B one after the other, or a "
            f"tuple of {len(B)}, got {shape(A)}"
        )
    if isinstance(ranks, Tensor) and ranks.dim() != 1:
        raise ValueError(f"ranks must be [L] for a packed A, whose slices share a rank, got {shape(ranks)}")
    return [A[:, :R]] * len(B)


def expand(
    y: Any,
    v: Any,
    B: Sequence[Tensor],
    adapter_ids: Any,
    indptr: Any,
    plan: Any,
    scaling: Any,
    ranks: Any,
    weights: Any,
    scale: float,
) -> None:
    """The arguments of y += s v Bᵀ."""
    tensor("v", v)
    if v.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"v must be float32, got {v.dtype}")
    factors("B", B, v, "[L, N, R], or a tuple of those")
    L, S, R = num_adapters(B), num_slices(B), max(b.shape[-1] for b in B)
    if v.dim() != 3 or v.shape[0] != S or v.shape[2] != R:
        raise ValueError(f"v must be [{S}, M, {R}] for B {shape(B[0])}, got {shape(v)}")
    for i, b in enumerate(B):
        if b.dim() == 3 and (b.shape[0] != L or b.shape[2] != R):
            raise ValueError(f"B[{i}] must be [{L}, N, {R}], got {shape(b)}")
        if b.dim() == 2 and b.shape[0] != B[0].shape[0]:
            raise ValueError(f"B[{i}] must be [{B[0].shape[0]}, r] as B[0], got {shape(b)}")
    _rank("B", R)
    rows = v.shape[1] // (weights.shape[-1] if isinstance(weights, Tensor) and weights.dim() == 2 else 1)
    routing(rows, L, adapter_ids, indptr, plan, weights, v)
    N = sum(b.shape[1] for b in B) if B[0].dim() == 3 else B[0].shape[0]
    output(y, rows, N, v, FLOATS if v.dtype == torch.float32 else (torch.float64,))
    per_adapter("scaling", scaling, torch.float32, S, L, v)
    ranks_within(ranks, S, L, R, v)
