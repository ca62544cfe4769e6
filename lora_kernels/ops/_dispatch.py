"""Registration of the ops with ``torch.library`` and the way a call takes to its backend.

The schema of an op is read off its reference function. The compiled extension registers its kernels under the
dispatcher's CPU key, Triton's stand under its CUDA key and are imported at the first call; the reference serves every
device for which nothing faster is registered.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
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
from ..select import BACKENDS, choose

NAMESPACE = "lora_kernels"
logger = logging.getLogger(NAMESPACE)
_library = Library(NAMESPACE, "FRAGMENT")


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


@functools.cache
def _say_missing() -> None:
    logger.warning("the compiled CPU kernels are missing, so ops run on the slower reference: %s", extension_error)


class Op:
    """One registered op: calling it runs the backend chosen for its first tensor's device.

    A ``composite`` one is made of others where it has no kernel of its own: then it is as fast as they are.
    """

    registry: ClassVar[dict[str, Op]] = {}

    def __init__(
        self,
        reference: Callable,
        *,
        mutates: tuple[str, ...] = (),
        fake: Callable,
        flops: Callable | None = None,
        composite: bool = False,
    ):
        self.name = reference.__name__.removeprefix("_")
        self.reference = reference
        schema = infer_schema(reference, mutates_args=mutates)
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        #: The dispatcher's own callable, without a Python frame around it.
        self.direct = self.overload._op
        #: The compiled kernels without the dispatcher: of its arguments; False where the dispatcher must take the call.
        self.native: Callable[..., bool] | None = getattr(extension, self.name, None)
        self.family = reference.__module__.rpartition(".")[2].removeprefix("_")
        self.composite = composite
        if has_triton(self.family):
            _library.impl(self.name, self.triton, "CUDA")
        if flops is not None:
            register_flop_formula(getattr(torch.ops, NAMESPACE).__getattr__(self.name), get_raw=True)(flops)
        Op.registry[self.name] = self

    def backends(self) -> frozenset[str]:
        """The backends that have a kernel for this op here."""
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", "CPU")
        compiled |= self.composite and extension_error is None
        return frozenset(["reference"] + ["cpu"] * compiled + ["triton"] * has_triton(self.family))

    def triton(self, *args: Any) -> Any:
        """Run the op's Triton kernel: the function of its name and arguments in the module of its family.

        What is in fp64, which an op's first two arguments tell, is left to the reference.
        """
        if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args[:2]):
            return self.reference(*args)
        return self._launch(*args)

    def repeat(self, args: tuple) -> bool:
        """Run the op on a GPU where a call of this kind was checked and run before, without the dispatcher.

        Returns:
            Whether it was; False, with nothing done, also where something is to see the op called.
        """
        replay: Callable[[tuple], bool] | None = getattr(self._launch, "replay", None)
        if replay is None or _env.check() or any(watching() for watching in _WATCHERS):
            return False
        return replay(args)

    def forget(self) -> None:
        """Let every call be a first one, since what it rests on has changed."""
        self._launch.forget()  # type: ignore[attr-defined]

    @functools.cached_property
    def _launch(self) -> Callable:
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
            return self.overload(*args)
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        choice = choose(device, self.backends(), forced, interpreted=_env.interpreted())
        if choice.backend is None:
            raise RuntimeError(f"{self.name}: {choice.reason}")
        if choice.backend == "triton":
            return self.triton(*args)
        if choice.backend == "reference" or self.composite:
            return self.reference(*args)
        return self.overload(*args)
