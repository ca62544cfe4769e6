"""``torch.autograd.Function`` with less Python around it, for what one step of a model calls some hundred times.

After a large product neither Python's nor torch's code is in a cache, so each frame left out saves microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function
from torch.compiler import is_compiling

from ._dispatch import backend, forced_backend

_transformed = torch._C._are_functorch_transforms_active


def note_backend(ctx: Any) -> None:
    """Keep the backend that is forced now for the backward pass, which may run in another thread."""
    ctx.backend = None if is_compiling() else forced_backend()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's, in force only where somebody could differentiate twice (``create_graph``); by the noted backend."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        if ctx.backend is None:
            return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)
        with backend(ctx.backend):
            return guarded(ctx, *grads)

    return call


def applied(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` of positional arguments alone, past what torch does for functorch and ``setup_context``."""
    direct = super(Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return (function.apply if is_compiling() or _transformed() else direct)(*args)

    return apply
