"""What is checked: calls of ops with what they must give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..testing import Sample


class Want(NamedTuple):
    """What a call must give: the float64 ``oracle``, and by what the error rule measures."""

    oracle: Tensor
    plain: Tensor
    noise: float


class Call(NamedTuple):
    """One call of an op: ``run(device)`` makes its arguments and gives its results, on any device."""

    op: str
    run: Callable[[str], dict[str, Tensor]]
    want: dict[str, Want]


class Family(NamedTuple):
    """How one family is checked: its dtypes, its ops in the table's order, its samples and their calls."""

    dtypes: Sequence[str]
    ops: Sequence[str]
    samples: Callable[[str, bool], list[Sample]]
    calls: Callable[[Sample], Iterator[Call]]


def to(value: Any, device: str) -> Any:
    """The value, a tensor or a sequence with tensors in it, on a device."""
    if isinstance(value, (tuple, list)):
        return type(value)(to(entry, device) for entry in value)
    return value.to(device) if isinstance(value, Tensor) else value
