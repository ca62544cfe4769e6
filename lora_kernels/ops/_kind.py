"""What is the same in calls that a kernel runs alike: all but the addresses and the values in the tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS_MOST = 1024  # that are remembered of an op
_PLAIN = (Tensor, torch.nn.Parameter)


def kind_of(args: tuple) -> tuple | None:
    """All that decides which kernels an op launches with which numbers, and whether its arguments are right.

    None where a kernel can't read them as they are, or where Triton looks at more (AMD).
    """
    if torch.version.hip:
        return None
    kind: list[Any] = []
    try:
        for a in args:
            if isinstance(a, Tensor):
                kind += _of_tensor(a)
            elif isinstance(a, (tuple, list)):
                kind.append(len(a))
                for t in a:
                    kind += _of_tensor(t)
            elif a is None or isinstance(a, (int, float)):
                kind.append(a)
            else:
                return None
    except (AttributeError, TypeError, RuntimeError):
        return None
    return tuple(kind)


def _of_tensor(t: Tensor) -> tuple:
    if type(t) not in _PLAIN or t.is_neg():
        raise TypeError
    return t.dtype, t.get_device(), t.shape, t.stride(), t.data_ptr() & 15
