"""Launches without what is the same each time.

A launch through Triton takes some 30 µs of the host's time: it looks at every argument to find the compiled kernel.
An op that is called again with tensors of the same kinds, as every layer of every step does, launches the same kernels
with the same numbers, and only addresses differ. So :func:`repeatable` notes what an op allocates and launches, and
does just that the next time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.ops._kind import KINDS_MOST, kind_of

from . import _device

_state = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, multiply-adds fused unless told; noted where an op is being recorded."""
    compiled = kernel[grid](*args, **{"enable_fp_fusion": True, **constants})
    recording = getattr(_state, "recording", None)
    if recording is not None:
        recording.add(kernel, compiled, grid, args, constants)


def repeatable(op: Callable[..., None]) -> Callable[..., None]:
    """An op that writes into its arguments and returns nothing, made fast when it is called again.

    Its attribute ``replay(args)`` runs it only where it is known to be right, and returns whether it did; ``forget()``
    makes every call a first one.
    """
    known: dict[tuple | None, _Recording | None] = {}

    def replay(args: tuple) -> bool:
        recording = known.get(kind_of(args))
        if recording is not None:
            recording.replay(args)
        return recording is not None

    @functools.wraps(op)
    def call(*args: Any) -> None:
        kind = kind_of(args)
        if kind is None:
            return op(*args)
        recording = known.get(kind, _NEW)
        if recording is _NEW:
            if len(known) >= KINDS_MOST:
                known.clear()
            known[kind] = _record(op, args)
        elif recording is None:
            op(*args)
        else:
            recording.replay(args)
        return None

    call.replay, call.forget = replay, known.clear  # type: ignore[attr-defined]
    return call


def _record(op: Callable[..., None], args: tuple) -> _Recording | None:
    """Call the op; what it did, or None where something beside allocations and launches was among it."""
    recording = _Recording(args)
    outer = getattr(_state, "recording", None)
    _state.recording = recording
    try:
        with recording:
            op(*args)
    finally:
        _state.recording = outer
    recording.kept = []
    return recording if recording.faithful else None


class _Recording(TorchDispatchMode):
    """What a call allocated and launched; a dispatch mode, so that no other work goes unseen."""

    def __init__(self, args: tuple):
        super().__init__()
        self.faithful = True
        self.allocations: list[Callable[[], Tensor]] = []
        self.launches: list[tuple[Callable[..., None], list[Any], list[tuple[int, int]]]] = []
        self.kept: list[Tensor] = []  # so that no address is given out twice
        self.slots: dict[Any, int] = {}  # of an address or a tuple of them: which argument, or allocation after these
        self.count = len(args)
        for slot, a in enumerate(args):
            if isinstance(a, Tensor):
                self._address(a.data_ptr(), slot)
            elif isinstance(a, (tuple, list)):
                self._address(tuple(t.data_ptr() for t in a), slot)

    def _address(self, address: Any, slot: int) -> None:
        self.faithful &= self.slots.setdefault(address, slot) == slot

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATING:
            self.kept.append(result)
            self._address(result.data_ptr(), self.count + len(self.allocations))
            make = torch.zeros if func in _ZEROING else torch.empty
            shape, dtype, device = tuple(result.shape), result.dtype, result.device
            self.allocations.append(functools.partial(make, shape, dtype=dtype, device=device))
            self.faithful &= result.is_contiguous()
        elif not func.is_view and func is not _ALIAS:
            self.faithful = False
        return result

    def add(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple, constants: dict[str, Any]) -> None:
        """Note a launch; ``compiled`` is None in Triton's interpreter."""
        if compiled is None or not hasattr(compiled, "__getitem__"):
            self.faithful = False
            return
        values = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
        moving = []
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                address: Any = value.data_ptr()
            elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                address = tuple(t.data_ptr() for t in value)
            else:
                continue
            slot = self.slots.get(address)
            if slot is None:
                self.faithful = False
                return
            moving.append((place, slot))
            values[place] = None
        self.launches.append((compiled[(*grid, 1, 1)[:3]], values, moving))

    def replay(self, args: tuple) -> None:
        """Do the same with other tensors."""
        tensors = [*args, *(make() for make in self.allocations)]
        with _device.on(args[0]):
            for run, values, moving in self.launches:
                values = values.copy()
                for place, slot in moving:
                    value = tensors[slot]
                    values[place] = tuple(value) if type(value) is list else value
                run(*values)


_NEW: Any = object()
_ALIAS = torch.ops.aten._reshape_alias.default
_ZEROING = {torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default}
_ALLOCATING = _ZEROING | {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}
