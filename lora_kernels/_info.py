"""``lora_kernels.info()``: which backend runs each op on each device here, and why not the others.

The module is not called ``info``: importing it would put a module where the package has the function.
"""

from __future__ import annotations

import importlib
import pkgutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import ops
from ._version import __version__
from .collect_env import cpu_name
from .ops._dispatch import Op, cuda_architectures, extension_error, forced_backend, gpu
from .select import BACKENDS, choose


@dataclass(frozen=True)
class OpInfo:
    """What runs one op for tensors on one device.

    Attributes:
        family: ``low_rank``, ...
        op: its name in ``torch.ops.lora_kernels``.
        device: the type of device, as in ``torch.device(...).type``.
        backend: what runs it; None where the forced backend can't.
        reason: why that one.
        others: every other backend and why it does not run the op.
    """

    family: str
    op: str
    device: str
    backend: str | None
    reason: str
    others: dict[str, str]


@dataclass(frozen=True)
class Info:
    """What :func:`info` found; ``str()`` of it is a table.

    Attributes:
        version: the package's.
        torch: its version.
        threads: that torch's CPU ops and the kernels use.
        devices: the name of the device of each type present, by type.
        extension_error: why the compiled kernels are missing; None where they are loaded.
        instruction_sets: of the CPU, that the compiled kernels can use here, the best last.
        instruction_set: the one they use; None without them.
        cuda_architectures: what the CUDA kernels are compiled for: ``sm_90``, ``compute_100`` for PTX, which the driver
            compiles for newer GPUs, ...; empty without them.
        forced: the backend forced now, or None.
        ops: every op on every device.
    """

    version: str
    torch: str
    threads: int
    devices: dict[str, str]
    extension_error: str | None
    instruction_sets: tuple[str, ...]
    instruction_set: str | None
    cuda_architectures: tuple[str, ...]
    forced: str | None
    ops: tuple[OpInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return asdict(self)

    def __str__(self) -> str:
        if self.extension_error is None:
            compiled = f"{', '.join(self.instruction_sets)}; using {self.instruction_set}"
            cuda = ", ".join(self.cuda_architectures) or "none: built without CUDA"
        else:
            compiled = cuda = f"none: {self.extension_error}"
        head = [("lora_kernels", self.version), ("torch", f"{self.torch}, {self.threads} threads")]
        head += [("CPU kernels", compiled), ("CUDA kernels", cuda), ("forced backend", self.forced or "none")]
        head += [(f"device {kind}", name) for kind, name in self.devices.items()]
        return "\n".join(
            [*columns(head), "", *columns([("device", "family", "op", "runs on"), *self._rows()]), *self._why()]
        )

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(op.device, op.family, op.op, op.backend or "nothing") for op in self.ops]

    def _why(self) -> list[str]:
        """The reasons, each said once with the ops that share it."""
        shared: dict[tuple[str, str], list[str]] = {}
        for op in self.ops:
            for name, reason in [(op.backend or "nothing", op.reason), *op.others.items()]:
                shared.setdefault((op.device, f"{name}: {reason}"), []).append(op.op)
        lines = []
        for device in self.devices:
            count = sum(op.device == device for op in self.ops)
            lines += ["", f"Why, for {device} tensors"]
            for (where, text), names in shared.items():
                if where == device:
                    only = "" if len(names) == count else f" ({', '.join(names)})"
                    lines += textwrap.wrap(text + only, 100, initial_indent="  ", subsequent_indent="    ")
        return lines


def info() -> Info:
    """Which backend runs each op on each type of device here, and why not the others."""
    compiled = torch.ops.lora_kernels_C if extension_error is None else None
    return Info(
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        devices=devices(),
        extension_error=extension_error,
        instruction_sets=tuple(compiled.isas()) if compiled else (),
        instruction_set=compiled.get_isa() if compiled else None,
        cuda_architectures=cuda_architectures() if compiled else (),
        forced=forced_backend(),
        ops=tuple(_op_info(op, device) for device in devices() for op in all_ops()),
    )


def devices() -> dict[str, str]:
    """The types of device torch can use here and the name of the current one of each."""
    found = {"cpu": cpu_name()}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found[accelerator.type] = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return found


def all_ops() -> list[Op]:
    """Every registered op of every family."""
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{ops.__name__}.{module.name}")
    return list(Op.registry.values())


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines of text with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _op_info(op: Op, device: str) -> OpInfo:
    available = op.backends()
    cuda_first = device == "cuda" and torch.cuda.is_available() and gpu(torch.device("cuda")).cuda
    choice = choose(device, available, forced_backend(), cuda_first=cuda_first)
    others = {name: _why_not(name, device, available) for name in BACKENDS if name != choice.backend}
    return OpInfo(op.family, op.name, device, choice.backend, choice.reason, others)


def _why_not(name: str, device: str, available: frozenset[str]) -> str:
    asked = choose(device, available, forced=name)
    if asked.backend is not None:
        return f"available; lora_kernels.backend({name!r}) forces it"
    if name == "cpu" and device == "cpu" and extension_error is not None:
        return f"the compiled kernels are missing: {extension_error}"
    return asked.reason
