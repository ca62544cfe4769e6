"""Every shipped kernel, compiled for each architecture, within its limits and as the snapshot has it."""

import functools
import importlib
import itertools
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
import triton
from driver import TARGETS, compiling_for, configuration
from resources import faults, resources
from snapshot import Snapshot

from lora_kernels import select

FAMILIES = ("low_rank", "lora_linear", "quantized", "transforms", "spectral")
COMPILER = f"Triton {triton.__version__}"


@dataclass
class Compiled:
    """Of a family on a target: {name: (kernel, aligned, resources)}, and what was asked of ``select.py``."""

    kernels: dict[str, tuple] = field(default_factory=dict)
    asked: set = field(default_factory=set)

    @property
    def resources(self):
        return {name: found for name, (_, _, found) in self.kernels.items()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request):
    return request.param


@pytest.fixture
def compiled(family, target):
    return compile_all(family, target)


@functools.cache
def compile_all(family, target):
    """A kernel is named after the first case that launches it."""
    importlib.import_module(f"lora_kernels.kernels.triton.{family.__name__}")  # to be spied on
    found, seen = Compiled(), set()
    with spied() as found.asked, compiling_for(target) as launched:
        for case in family.CASES:
            launched.clear()
            case.run()
            for kernel in launched:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    name = unused(f"{case.name}: {kernel.name}", found.kernels)
                    found.kernels[name] = (kernel, case.aligned, resources(kernel))
    return found


def unused(name, taken):
    numbered = (f"{name} {i}" for i in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in taken)


@contextmanager
def spied():
    """Yields the set of what ``select.py`` is asked inside: (tiles, dtypes they are for)."""
    asked = set()

    def spy(choose):
        def choosing(*args):
            tiles = choose(*args)
            asked.add((tiles, tuple(a for a in args if isinstance(a, torch.dtype))))
            return tiles

        return choosing

    modules = [module for name, module in sys.modules.items() if name.startswith("lora_kernels.kernels.triton.")]
    with ExitStack() as stack:
        for name, choose in [item for item in vars(select).items() if item[0].endswith("_tiles")]:
            for module in [select, *(m for m in modules if getattr(m, name, None) is choose)]:
                stack.enter_context(patch.object(module, name, spy(choose)))
        yield asked


def test_limits(family, compiled, target):
    """Widths under the snapshot's Triton only: 3.9 counts the lines of its inline assembly, so no load has a name."""
    pinned = Snapshot(family.__name__, COMPILER).comparable
    wrong = {}
    for name, (kernel, aligned, found) in compiled.kernels.items():
        wide = family.WIDE.get(kernel.name, ()) if aligned and pinned else ()
        wrong |= {f"{name}: {fault}": configuration(kernel) for fault in faults(kernel, found, target, wide)}
    here = {target.name, f"{target.name} Triton {triton.__version__.rpartition('.')[0]}"}
    known = [begin for begin, where in family.KNOWN.items() if here & {*where}]
    new = [f"{fault}\n    {where}" for fault, where in wrong.items() if not fault.startswith(tuple(known))]
    gone = [
        f"{begin}: no longer so, take it out of KNOWN" for begin in known if not any(f.startswith(begin) for f in wrong)
    ]
    fail_of(target, new + gone * pinned)


def test_snapshot(family, compiled, target, request):
    snapshot = Snapshot(family.__name__, COMPILER)
    if request.config.getoption("--update-snapshot", False):
        snapshot.update(target.name, compiled.resources)
    elif not snapshot.comparable:
        pytest.skip(f"the snapshot is of {snapshot.written_with}, this is {COMPILER}")
    fail_of(target, snapshot.differences(target.name, compiled.resources))


def test_every_choice_is_compiled(family, compiled, target):
    with spied() as asked:
        family.choices(target.gpu)
    missing = {family.kind(*one) for one in asked} - {family.kind(*one) for one in compiled.asked}
    fail_of(target, [f"no case of {family.__name__} asks for {one}" for one in missing])


def fail_of(target, lines):
    if lines:
        pytest.fail("\n".join([f"on {target.name}:", *lines]), pytrace=False)
