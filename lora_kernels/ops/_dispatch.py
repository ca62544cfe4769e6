"""Registration of the ops with ``torch.library`` and the way a call takes to its backend.

The schema of an op is read off its reference function. The compiled extension registers its CPU kernels under the
dispatcher's CPU key. Under its CUDA key stands a choice between the extension's CUDA kernels, which it has in a
namespace of their own, and Triton's, which are imported at the first call. The reference serves every device for which
nothing faster is registered.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import Library, infer_schema, register_fake
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from .. import _env
from ..select import BACKENDS, Gpu, choose, runs_on
from ._kind import KINDS_MOST, kind_of

NAMESPACE = "lora_kernels"
COMPILED = "lora_kernels_C"  # ops that only the extension has
logger = logging.getLogger(NAMESPACE)
_library = Library(NAMESPACE, "FRAGMENT")
_compiled_library = Library(COMPILED, "FRAGMENT")


#: Each says whether something is on in this thread that is to see the ops called: a call then takes the dispatcher.
_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    torch._C._are_functorch_transforms_active,
    torch._C._autograd._profiler_enabled,
    torch._C._is_tracing,
)


def _load_extension() -> tuple[Any, str | None]:
    """(the compiled kernels, None), or (None, why there are none)."""
    try:
        extension = importlib.import_module(f"{NAMESPACE}._C")
    except ImportError as error:
        return None, str(error)
    if (isa := _env.isa()) is not None:
        if isa not in (here := torch.ops.lora_kernels_C.isas()):
            raise ValueError(f"LORA_KERNELS_ISA={isa}: this machine has {', '.join(here)}")
        torch.ops.lora_kernels_C.set_isa(isa)
    if (exchange := getattr(Tensor, "__dlpack_c_exchange_api__", None)) is not None:
        extension.connect(exchange, (Tensor, Parameter), _WATCHERS, Tensor.is_neg)
        extension.connect_linear(torch.nn.functional.linear, (torch._C._is_any_autocast_enabled,))
    return extension, None


#: The compiled module, None without one.
extension, extension_error = _load_extension()


def cuda_architectures() -> tuple[str, ...]:
    """What the extension's CUDA kernels are compiled for: ``sm_90``, ``compute_100`` for PTX, ...; () without them."""
    compiled = torch.ops.lora_kernels_C
    return tuple(compiled.cuda_architectures()) if hasattr(compiled, "cuda_architectures") else ()


_from_environment = _env.backend()
_forced: ContextVar[str | None] = ContextVar("lora_kernels_backend", default=_from_environment)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the ``with``.

    Args:
        name: ``reference``, ``cpu``, ``triton``, ``cuda`` or ``sim``.

    Raises:
        ValueError: no backend has that name. A call that the forced backend can't take raises ``RuntimeError``.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def under(name: str | None) -> contextlib.AbstractContextManager:
    """:func:`backend`, or nothing where none was forced: for a thread that runs on behalf of another."""
    return contextlib.nullcontext() if name is None else backend(name)


#: The backend that :func:`backend` or ``LORA_KERNELS_BACKEND`` forces now, or None.
forced_backend: Callable[[], str | None] = _forced.get


@functools.cache
def has_triton(family: str) -> bool:
    """Whether Triton is installed and the family has kernels for it; neither is imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    return importlib.util.find_spec(f"{NAMESPACE}.kernels.triton.{family}") is not None


def gpu(device: torch.device) -> Gpu:
    """What of a GPU decides which kernel runs on it."""
    return importlib.import_module(f"{NAMESPACE}.kernels.configs").gpu(device)


@functools.cache
def compiled_for(device: torch.device) -> bool:
    """Whether the extension's CUDA kernels run on a GPU."""
    return runs_on(gpu(device).capability, cuda_architectures())


@functools.cache
def simulator() -> Any:
    """The module that runs CUDA kernels on the CPU (``csrc/sim``), None without it; built for tests, never shipped."""
    if importlib.util.find_spec(f"{NAMESPACE}._sim") is None:
        return None
    return importlib.import_module(f"{NAMESPACE}._sim")


@functools.cache
def _say_missing() -> None:
    logger.warning("the compiled CPU kernels are missing, so ops run on the slower reference: %s", extension_error)


def one_device(*args: Any) -> None:
    """What a fake must see to, since one meta tensor among others brings a call to it."""
    devices = {t.device for a in args for t in (a if isinstance(a, (tuple, list)) else (a,)) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"tensors on {len(devices)} devices")


def _on_one_device(new: Callable) -> Callable:
    @functools.wraps(new)
    def fake(*args: Any) -> Any:
        one_device(*args)
        return new(*args)

    return fake


class Op:
    """One registered op: calling it runs the backend chosen for its first tensor's device.

    Args:
        reference: the op in plain PyTorch; its signature is the schema.
        mutates: the names of the arguments it writes.
        fake: what it returns, without data.
        new: in place of ``fake``: room for what it returns, of its arguments; :attr:`native` fills it.
        cpu: its CPU kernel in Python, over those that the extension has in a namespace of their own.
        flops: its FLOP formula.
        composite: made of other ops where it has no kernel of its own: then it is as fast as they are.
        cuda_refuses: of its arguments: why the CUDA kernel can't take them, or None.
        prefers_cuda: of its arguments: whether the CUDA kernel is the faster one, where there is one in Triton too.
    """

    registry: ClassVar[dict[str, Op]] = {}

    def __init__(
        self,
        reference: Callable,
        *,
        mutates: tuple[str, ...] = (),
        fake: Callable | None = None,
        new: Callable | None = None,
        cpu: Callable | None = None,
        flops: Callable | None = None,
        composite: bool = False,
        cuda_refuses: Callable[..., str | None] = lambda *args: None,
        prefers_cuda: Callable[..., bool] = lambda *args: True,
    ):
        self.name = reference.__name__.removeprefix("_")
        self.reference = reference
        schema = infer_schema(reference, mutates_args=mutates)
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        if cpu is not None and extension is not None:
            _library.impl(self.name, cpu, "CPU")
        if new is not None:
            fake = _on_one_device(new)
        if fake is None:
            raise TypeError(f"{self.name} needs fake or new")
        register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        #: The dispatcher's own callable, without a Python frame around it.
        self.direct = self.overload._op
        #: The compiled kernels without the dispatcher: of its arguments, and of ``new`` if there is one, the results;
        #: False or None, with nothing done, where the dispatcher must take the call.
        self.native: Callable[..., Any] | None = getattr(extension, self.name, None)
        self.new = new if self.native is not None else None
        self.family = reference.__module__.rpartition(".")[2].removeprefix("_")
        self.composite = composite
        self.cuda_refuses, self.prefers_cuda = cuda_refuses, prefers_cuda
        _compiled_library.define(self.name + schema)
        #: The CUDA kernel's launch, None where the extension has none.
        self.cuda: Callable | None = None
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{COMPILED}::{self.name}", "CUDA"):
            self.cuda = getattr(torch.ops.lora_kernels_C, self.name).default._op
        #: The kinds of calls that the CUDA kernel took.
        self._known: set[tuple] = set()
        if self.has_gpu_kernel():
            _library.impl(self.name, self.on_gpu, "CUDA")
        if flops is not None:
            register_flop_formula(getattr(torch.ops, NAMESPACE).__getattr__(self.name), get_raw=True)(flops)
        Op.registry[self.name] = self

    def backends(self) -> frozenset[str]:
        """The backends that have a kernel for this op here."""
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", "CPU")
        compiled |= self.composite and extension_error is None
        names = {"reference": True, "cpu": compiled, "triton": has_triton(self.family), "cuda": self.cuda is not None}
        names["sim"] = hasattr(simulator(), self.name)
        return frozenset(name for name, here in names.items() if here)

    def has_gpu_kernel(self) -> bool:
        """Whether a GPU needs not the reference."""
        return self.cuda is not None or has_triton(self.family)

    def on_gpu(self, *args: Any) -> Any:
        """Run the faster of the kernels that take the call."""
        if (cuda := self._faster_cuda(args)) is not None:
            kind = kind_of(args)
            result = cuda(*args)
            if result is None and kind is not None and len(self._known) < KINDS_MOST:
                self._known.add(kind)
            return result
        return self.triton(*args) if has_triton(self.family) else self.reference(*args)

    def _faster_cuda(self, args: tuple) -> Callable | None:
        """The CUDA kernel, where it takes the call and nothing is faster."""
        if self.cuda is None or not compiled_for(args[0].device):
            return None
        if has_triton(self.family) and not self.prefers_cuda(*args):
            return None
        return None if self.cuda_refuses(*args) else self.cuda

    def triton(self, *args: Any) -> Any:
        """Run the op's Triton kernel: the function of its name and arguments in the module of its family.

        What is in fp64, which an op's first two arguments tell, is left to the reference.
        """
        if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args[:2]):
            return self.reference(*args)
        return self._launch(*args)

    def repeat(self, args: tuple) -> bool:
        """Run the op on a GPU where a call of this kind was checked and run before, without checks or the dispatcher.

        Returns:
            Whether it was; False, with nothing done, also where something is to see the op called.
        """
        if _env.check() or any(watching() for watching in _WATCHERS):
            return False
        if self._known and kind_of(args) in self._known:
            self.cuda(*args)  # type: ignore[misc]
            return True
        replay: Callable[[tuple], bool] | None = getattr(self._launch, "replay", None)
        return replay is not None and replay(args)

    def forget(self) -> None:
        """Let every call be a first one, since what it rests on has changed."""
        self._known.clear()
        if hasattr(self._launch, "forget"):
            self._launch.forget()

    @functools.cached_property
    def _launch(self) -> Any:
        if not has_triton(self.family):
            return None
        return getattr(importlib.import_module(f"{NAMESPACE}.kernels.triton.{self.family}"), self.name)

    def __call__(self, *args: Any) -> Any:
        if is_compiling():
            return self.overload(*args)
        forced = _forced.get()
        if forced is None:
            if extension_error is not None:
                _say_missing()
            if self.composite and args[0].is_cpu:
                return self.reference(*args)
            if self.new is not None and args[0].is_cpu:
                results = self.native(*args, self.new)  # type: ignore[misc]
                if results is not None:
                    return results
            return self.direct(*args)
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        choice = choose(device, self.backends(), forced, interpreted=_env.interpreted())
        if choice.backend is None:
            raise RuntimeError(f"{self.name}: {choice.reason}")
        if choice.backend == "triton":
            if self._faster_cuda(args) is not None:  # what is noted of a launch would serve calls that are CUDA's
                return inspect.unwrap(self._launch)(*args)
            return self.triton(*args)
        if choice.backend in ("cuda", "sim"):
            if choice.backend == "cuda" and not compiled_for(args[0].device):
                raise RuntimeError(f"{self.name}: the CUDA kernels are compiled for {', '.join(cuda_architectures())}")
            if reason := self.cuda_refuses(*args):
                raise RuntimeError(f"{self.name}: the CUDA kernel takes no {reason}")
            launch: Any = self.cuda if choice.backend == "cuda" else getattr(simulator(), self.name)
            return launch(*args)
        if choice.backend == "reference" or self.composite:
            return self.reference(*args)
        return self.overload(*args)
