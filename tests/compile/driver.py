"""Compilation for a GPU that is not there: inside ``compiling_for`` a launch compiles and nothing runs.

Written against Triton 3.6 to 3.9.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from lora_kernels.kernels.triton import _device
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lora_kernels.ops._dispatch import Op
from lora_kernels.select import Gpu


@dataclass(frozen=True)
class Target:
    """An architecture: what Triton compiles for, what the launch code is told of it, and an access's bits at full rate.

    AMD's matrix instructions leave a thread four numbers of a row, and 64 lanes of 64 bits are four cache lines.
    """

    name: str
    triton: GPUTarget
    gpu: Gpu
    wide: int = 128
    hip: str | None = None


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), Gpu((8, 0), 163 * 1024)),
    Target("sm_90", GPUTarget("cuda", 90, 32), Gpu((9, 0), 227 * 1024)),
    Target("sm_100", GPUTarget("cuda", 100, 32), Gpu((10, 0), 227 * 1024)),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), Gpu((0, 0), 64 * 1024), wide=64, hip="6.4"),
)


@contextmanager
def compiling_for(target):
    """Ops run their Triton kernels as on ``target``; yields the list that launches add their compiled kernel to.

    Tensors made inside have a shape, strides and a dtype but no memory, so a case may be as large as a model is.
    """
    launched = []

    def launcher(kernel, grid):
        return lambda *args, **kwargs: launched.append(kernel.warmup(*args, grid=grid, **kwargs))

    with ExitStack() as stack:
        for owner, name, value in (
            (driver, "_active", CompileOnlyDriver(target.triton)),
            (JITFunction, "__getitem__", launcher),
            (Op, "__call__", Op.triton),
            (_device, "gpu", lambda device: target.gpu),
            (torch.version, "hip", target.hip),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(torch.device("meta"))
        yield launched


class CompileOnlyDriver(DriverBase):
    """A GPU of which Triton asks no more than its architecture."""

    def __init__(self, target):
        self.target = target

    @classmethod
    def is_active(cls):
        return False

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"compile-only {self.target}"  # by which Triton keeps the kernels of different devices apart

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


def configuration(kernel):
    """What ``kernel`` was compiled with, in words: the types and constants of its arguments, its warps and stages."""
    names = kernel.src.fn.arg_names
    types = [f"{name}: {type_}" for name, type_ in kernel.src.signature.items() if type_ != "constexpr"]
    constants = [f"{names[at[0]]}={value}" for at, value in kernel.src.constants.items()]
    options = [f"{name}={getattr(kernel.metadata, name)}" for name in ("num_warps", "num_stages")]
    return f"{kernel.name}({', '.join(types + constants + options)})"
