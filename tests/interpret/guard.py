"""Triton's interpreter as a checker: bounds, races, and bf16 as the hardware computes it.

Unaided, the interpreter reads and writes any address, runs the programs of a launch one by one so that no race shows,
and computes on the bits of bf16 as if they were integers. Written against Triton 3.6 to 3.9, whose builders differ in
trailing arguments: these are passed on unread. Atomics on bf16 are an error of the interpreter itself.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


class Violation(AssertionError):
    """A ``program`` (x, y, z) did a ``kind`` of access (load, store or atomic) that is wrong in so many ``lanes``."""

    def __init__(self, kind, lanes, program, message):
        super().__init__(message)
        self.kind, self.lanes, self.program = kind, lanes, program


@contextmanager
def installed():
    """Launches inside are checked: a wrong access raises Violation out of the launch."""
    with ExitStack() as stack:
        for owner, names, wrap in PATCHES:
            for name in names:
                stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))
        stack.enter_context(patch.object(InterpreterBuilder, "get_bf16", get_bf16, create=True))  # 3.6 has none
        yield


@contextmanager
def programs_backwards():
    """Launches inside run their programs in reverse: a result that changes depends on their order."""
    forwards = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, *index):
        forwards(self, *(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)))

    with patch.object(InterpreterBuilder, "set_grid_idx", set_grid_idx):
        yield


@contextmanager
def counting(*tensors):
    """The bytes that launches inside load from each tensor, a lane at a time: a function of one of them."""
    spans = [span(t) for t in tensors]
    loaded = dict.fromkeys(spans, 0)

    def count(kind, addresses, size):
        if kind == "load":
            for start, end in spans:
                loaded[start, end] += size * int(((addresses >= start) & (addresses < end)).sum())

    counters.append(count)
    try:
        yield lambda t: loaded[span(t)]
    finally:
        counters.remove(count)


counters = []  # what each access is told to


# Accesses by another program to the same byte that an access races with.
RACES = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
MANY = -1  # more than one program


class Memory:
    """What a launch may touch, and which program touched it: a shadow of each byte the tensor arguments span.

    The spans lie one after the other in the shadow, those that overlap as one: span i holds the addresses
    ``start[i]`` to ``end[i]``, its shadow begins at ``at[i]``. Program ids count from 1.
    """

    def __init__(self, tensors):
        lowest = np.iinfo(np.int64).min
        spans = [[lowest, lowest]]  # the empty span before all, so that every address has one at or below it
        for start, end in sorted(span(t) for t in tensors):
            if start < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([start, end])
        self.start, self.end = np.array(spans, dtype=np.int64).T
        sizes = self.end - self.start
        self.at = np.cumsum(sizes) - sizes
        self.owned = np.zeros(sizes.sum(), dtype=bool)
        self.seen = {kind: np.zeros(sizes.sum(), dtype=np.int32) for kind in RACES}
        for t in tensors:
            self.own(t)

    def own(self, t):
        """Marks the elements of a tensor, and not the gaps that its strides leave."""
        size = t.element_size()
        strides = (*(s * size for s in t.stride()), 1)
        first = self.shadow(np.array([t.data_ptr()]))[0]
        np.lib.stride_tricks.as_strided(self.owned[first:], (*t.shape, size), strides)[...] = True

    def shadow(self, addresses):
        i = self.span_below(addresses)
        return addresses - self.start[i] + self.at[i]

    def span_below(self, addresses):
        return np.searchsorted(self.start, addresses, side="right") - 1

    def access(self, kind, pointers, mask=None, value=None):
        """Checks and records one access of the program that runs now."""
        shape = pointers.data.shape
        live = np.ones(shape, dtype=bool) if mask is None else np.broadcast_to(np.asarray(mask.data, dtype=bool), shape)
        addresses = pointers.data[live].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        touched = self.in_bounds(kind, addresses, size)
        for count in counters:
            count(kind, addresses, size)
        if value is not None:
            self.one_value_each(kind, addresses, np.broadcast_to(value.data, shape)[live])
        self.no_race(kind, touched)

    def in_bounds(self, kind, addresses, size):
        """The shadow indices of the accessed bytes, [lanes, size]."""
        touched = self.shadow(addresses)[:, None] + np.arange(size)
        inside = addresses + size <= self.end[self.span_below(addresses)]
        inside[inside] = self.owned[touched[inside]].all(axis=1)
        self.require(kind, inside, "outside every tensor argument")
        return touched

    def one_value_each(self, kind, addresses, values):
        bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
        _, first, lane = np.unique(addresses, return_index=True, return_inverse=True)
        self.require(kind, bits == bits[first][lane], "write another value where a lane beside them writes")

    def no_race(self, kind, touched):
        builder = interpreter.interpreter_builder
        me = 1 + np.ravel_multi_index(builder.grid_idx, builder.grid_dim)
        for other in RACES[kind]:
            who = self.seen[other][touched]
            alone = ((who == 0) | (who == me)).all(axis=1)
            self.require(kind, alone, f"race with another program's {other}")
        who = self.seen[kind][touched]
        self.seen[kind][touched] = np.where((who == 0) | (who == me), me, MANY)

    def require(self, kind, right, problem):
        if not right.all():
            wrong = int((~right).sum())
            program = tuple(interpreter.interpreter_builder.grid_idx)
            message = f"{kind}: {wrong} of {right.size} lanes {problem}, in program {program}"
            raise Violation(kind, wrong, program, message)


memory = None  # of the launch that runs now


def span(t):
    """The addresses [start, end) between which a tensor's elements lie."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + elements * t.element_size()


def tensors_in(argument):
    """The tensors of a kernel argument: a tuple, a tensor, or a descriptor or wrapper of one, its base."""
    if isinstance(argument, (tuple, list)):
        return [t for item in argument for t in tensors_in(item)]
    if isinstance(argument, torch.Tensor):
        return [argument]
    return tensors_in(argument.base) if hasattr(argument, "base") else []


def remembering_arguments(original):
    def _init_args_hst(self, *args):
        # What it returns, not what it was given: the arguments on the CPU, where the addresses are taken.
        global memory
        positional, named = original(self, *args)
        memory = Memory(tensors_in([*positional, *named.values()]))
        return positional, named

    return _init_args_hst


def raising_violations(original):
    def __call__(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except InterpreterError as error:
            cause = error
            while cause.__cause__ is not None:  # one for each kernel function it came through
                cause = cause.__cause__
            if isinstance(cause, Violation):
                raise cause from None
            raise

    return __call__


def checking_load(original):
    def load(self, pointers, mask, *rest, **named):
        memory.access("load", pointers, mask)
        return original(self, pointers, mask, *rest, **named)

    return load


def checking_store(original):
    def store(self, pointers, value, mask, *rest, **named):
        memory.access("store", pointers, mask, value)
        return original(self, pointers, value, mask, *rest, **named)

    return store


def checking_rmw(original):
    def rmw(self, op, pointers, value, mask, *rest, **named):
        memory.access("atomic", pointers, mask)
        return original(self, op, pointers, value, mask, *rest, **named)

    return rmw


def checking_cas(original):
    def cas(self, pointers, *rest, **named):
        memory.access("atomic", pointers)
        return original(self, pointers, *rest, **named)

    return cas


def is_bf16(handle):
    """Not by the dtype alone: a comparison's handle keeps that of its operands, and holds bool."""
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def widened(handle):
    if not is_bf16(handle):
        return handle
    bits = np.asarray(handle.data.astype(np.uint32) << 16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def narrowed(data):
    """A bf16 handle of numbers or bools, rounded to nearest even."""
    rounded = torch.from_numpy(np.array(data, dtype=np.float32, order="C")).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def in_fp32(original):
    """bf16 operands are exact in fp32; of a result only what is a number is rounded back."""

    def op(self, *operands, **named):
        result = original(self, *map(widened, operands), **named)
        if any(map(is_bf16, operands)) and result.data.dtype.kind == "f":
            return narrowed(result.data)
        return result

    return op


def alike_in_any_place(original):
    """In numpy's product the order of a row's sum may depend on the row's place in the tile; fp64 hides it."""

    def create_dot(self, a, b, d, *rest, **named):
        a, b = widened(a), widened(b)
        if d.data.dtype != np.float32:
            return original(self, a, b, d, *rest, **named)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    return create_dot


def reduced_in_fp32(original):
    """Rounded once; the hardware, whose order is its own, rounds at each step."""

    def reduce(self, operand, *rest, **named):
        if not is_bf16(operand.handle):
            return original(self, operand, *rest, **named)
        results = original(self, self.to_tensor(widened(operand.handle).data, tl.float32), *rest, **named)
        several = isinstance(results, (list, tuple))
        return type(results)(map(narrowed_tensor, results)) if several else narrowed_tensor(results)

    return reduce


def narrowed_tensor(t):
    if t.dtype != tl.float32:  # an index
        return t
    type_ = tl.block_type(tl.bfloat16, list(t.shape)) if t.type.is_block() else tl.bfloat16
    return tl.tensor(narrowed(t.handle.data), type_)


def casting(original):
    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16:
            return narrowed(widened(source).data)
        return original(self, widened(source), target)

    return cast_impl


def get_bf16(self, value):
    return narrowed([value])


PATCHES = (
    (GridExecutor, ("_init_args_hst",), remembering_arguments),
    (GridExecutor, ("__call__",), raising_violations),
    (InterpreterBuilder, ("create_masked_load",), checking_load),
    (InterpreterBuilder, ("create_masked_store",), checking_store),
    (InterpreterBuilder, ("create_atomic_rmw",), checking_rmw),
    (InterpreterBuilder, ("create_atomic_cas",), checking_cas),
    (InterpreterBuilder, ("binary_op", "unary_op", "create_fma", "create_clampf"), in_fp32),
    (InterpreterBuilder, ("create_dot",), alike_in_any_place),
    (InterpreterBuilder, ("cast_impl",), casting),
    (ReduceOps, ("sum", "min_max"), reduced_in_fp32),
    (ScanOps, ("cumsum", "cumprod"), reduced_in_fp32),
)
