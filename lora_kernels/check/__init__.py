"""``lora-kernels check``: every backend and instruction set here against float64 oracles, within the error rule.

Each sample of a family, from :mod:`lora_kernels.testing`, makes several calls; each call runs on every :class:`Target`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_kernels as lk

from .._info import all_ops, columns, devices
from .._version import __version__
from ..ops._dispatch import Op, extension_error
from ..select import BACKENDS, choose
from ..testing import assert_within_rule, poison, rms, threads
from .calls import Call
from .lora_linear import LORA_LINEAR
from .low_rank import LOW_RANK
from .quantized import QUANTIZED
from .spectral import SPECTRAL
from .transforms import TRANSFORMS

FAMILIES = {
    "low_rank": LOW_RANK,
    "lora_linear": LORA_LINEAR,
    "quantized": QUANTIZED,
    "transforms": TRANSFORMS,
    "spectral": SPECTRAL,
}


class Target(NamedTuple):
    """What a call runs on."""

    device: str
    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        name = self.isa or self.backend
        return name if self.device == "cpu" else f"{self.device}:{name}"


@dataclass
class Cell:
    """All calls of one op in one combination of dtypes on one target.

    Attributes:
        worst: the largest error over the allowed one; infinite where a call raised or gave NaN.
        failures: what the error rule, or the exception, says of each call that failed.
    """

    op: str
    dtype: str
    target: Target
    worst: float = 0.0
    calls: int = 0
    failures: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For ``json.dumps``; ``worst`` is None where it is infinite."""
        worst = self.worst if math.isfinite(self.worst) else None
        head = {"op": self.op, "dtype": self.dtype, **self.target._asdict(), "passed": not self.failures}
        return {**head, "worst": worst, "calls": self.calls, "failures": self.failures}


@dataclass
class Report:
    """What :func:`check` found; ``str()`` of it is a table."""

    family: str
    seconds: float
    targets: list[Target]
    cells: list[Cell]
    missing: str | None = extension_error

    @property
    def passed(self) -> bool:
        """Whether every call of every op on every target is within the rule."""
        return not any(cell.failures for cell in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        cells = [cell.to_dict() for cell in self.cells]
        about = {"version": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        head = {"family": self.family, "passed": self.passed, "seconds": round(self.seconds, 1)}
        return {**about, **head, "compiled_kernels_missing": self.missing, "cells": cells}

    def __str__(self) -> str:
        found = {(cell.op, cell.dtype, cell.target): cell for cell in self.cells}
        rows = [["op", "dtype", *map(str, self.targets)]]
        for op, dtype in dict.fromkeys((cell.op, cell.dtype) for cell in self.cells):
            rows.append([op, dtype, *(_mark(found[op, dtype, target]) for target in self.targets)])
        calls, failed = sum(cell.calls for cell in self.cells), [cell for cell in self.cells if cell.failures]
        lines = [f"{self.family}: largest error over the allowed error (1.00 is all of it)", *columns(rows)]
        for cell in failed:
            more = f" (and {len(cell.failures) - 1} more)" if len(cell.failures) > 1 else ""
            lines.append(f"FAIL {cell.op} {cell.dtype} on {cell.target}: {cell.failures[0]}{more}")
        if self.missing is not None:
            lines.append(f"The compiled CPU kernels are missing and were not checked: {self.missing}")
        verdict = f"{len(failed)} of {len(self.cells)} FAILED" if failed else "all passed"
        return "\n".join([*lines, f"{verdict}: {calls} calls in {self.seconds:.0f} s"])


def _mark(cell: Cell) -> str:
    return f"{cell.worst:.2f}{' FAIL' if cell.failures else ''}"


def check(
    family: str = "low_rank",
    *,
    full: bool = False,
    dtypes: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Report:
    """Hold every op of a family, on every backend available here, to the error rule.

    Args:
        family: one of :data:`FAMILIES`.
        full: every sample, not the choice that takes less than a minute.
        dtypes: the combinations of dtypes; all of the family's where None.
        progress: called with the samples done, their number and the one that comes.

    Raises:
        ValueError: no such family or dtypes.
    """
    if family not in FAMILIES:
        raise ValueError(f"no family is called {family!r}; there are {', '.join(FAMILIES)}")
    plan = FAMILIES[family]
    if unknown := set(dtypes or ()) - set(plan.dtypes):
        raise ValueError(
            f"{family} has no dtypes called {', '.join(sorted(unknown))}; there are {', '.join(plan.dtypes)}"
        )
    start = time.perf_counter()
    found = targets(family)
    work = [(name, sample) for name in dtypes or plan.dtypes for sample in plan.samples(name, full)]
    cells: dict[tuple, Cell] = {}
    own = torch.get_num_threads()
    with poison(), _instruction_set_kept(), threads(1):  # what is small gains nothing from threads
        for done, (name, sample) in enumerate(work):
            progress(done, len(work), f"{name} {sample.name}")
            for call in plan.calls(sample):
                for target in found:
                    cell = cells.setdefault((call.op, name, target), Cell(call.op, name, target))
                    with threads(own if target.backend == "cpu" else 1):
                        results = _results(call, target)
                    _judge(results, call, sample.name, cell)
    progress(len(work), len(work), "")
    order = {op: i for i, op in enumerate(plan.ops)}
    return Report(family, time.perf_counter() - start, found, sorted(cells.values(), key=lambda cell: order[cell.op]))


def targets(family: str) -> list[Target]:
    """What runs the ops of a family here: each backend on each type of device, and each CPU instruction set."""
    ops = [op for op in all_ops() if op.reference.__module__.endswith(f".{family}")]
    found = []
    for device in devices():
        for backend in BACKENDS:
            if not all(_takes(op, device, backend) for op in ops):
                continue
            isas = torch.ops.lora_kernels_C.isas() if backend == "cpu" else [None]
            found += [Target(device, backend, isa) for isa in isas]
    return found


def _takes(op: Op, device: str, backend: str) -> bool:
    return choose(device, op.backends(), forced=backend).backend is not None


@contextmanager
def _instruction_set_kept() -> Iterator[None]:
    if extension_error is not None:
        yield
        return
    before = torch.ops.lora_kernels_C.get_isa()
    try:
        yield
    finally:
        torch.ops.lora_kernels_C.set_isa(before)


def _results(call: Call, target: Target) -> dict[str, Tensor] | Exception:
    if target.isa is not None:
        torch.ops.lora_kernels_C.set_isa(target.isa)
    try:
        with lk.backend(target.backend):
            return {name: result.detach().cpu() for name, result in call.run(target.device).items()}
    except Exception as error:
        return error


def _judge(results: dict[str, Tensor] | Exception, call: Call, sample: str, cell: Cell) -> None:
    cell.calls += 1
    if isinstance(results, Exception):
        cell.worst = math.inf
        cell.failures.append(f"{sample}: {type(results).__name__}: {results}")
        return
    for name, want in call.want.items():
        cell.worst = max(cell.worst, used(results[name], *want))
        try:
            assert_within_rule(results[name], want.oracle, want.plain, noise=want.noise, what=f"{sample}: {name}")
        except AssertionError as error:
            cell.failures.append(str(error))


def used(result: Tensor, oracle: Tensor, plain: Tensor, noise: float) -> float:
    """How much of the error that :func:`~lora_kernels.testing.assert_within_rule` allows is used: 1 is all of it."""
    finite = oracle.isfinite()
    if result.shape != oracle.shape or not torch.equal(result.isfinite(), finite):
        return math.inf
    error, yardstick = ((t.detach().double() - oracle.double())[finite] for t in (result, plain))
    if not error.numel():
        return 0.0
    largest, allowed = (float(t.abs().max()) for t in (error, yardstick))
    if result.dtype in (torch.bfloat16, torch.float16):
        limits = 1.05 * rms(yardstick), 2 * allowed
    else:
        limits = max(1.5 * rms(yardstick), noise), max(2 * allowed, 8 * noise)
    parts = zip((rms(error), largest), limits, strict=True)
    return max(value / limit if limit else math.inf if value else 0.0 for value, limit in parts)
