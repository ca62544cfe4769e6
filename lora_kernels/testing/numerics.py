"""The error rule, poisoned allocations and what a sample is, for every family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of an op.

    Attributes:
        name: unique among the samples of its op and dtype.
        make: the call's arguments by name, made afresh from a seed, the same for the same seed.
        traits: what is special about it, for tests that select: see the family's samples.
    """

    name: str
    make: Callable[[int], dict[str, Any]] = field(repr=False)
    traits: frozenset[str] = frozenset()


def rms(t: Tensor) -> float:
    """√mean(t²), 0 of an empty tensor."""
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; a NaN equals itself and -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def assert_within_rule(
    result: Tensor, oracle: Tensor, plain: Tensor, *, noise: float = 0.0, what: str = "result"
) -> None:
    """Assert the package's error rule for one sample.

    Relative RMS over the whole sample against the oracle: at most 1.05 times plain PyTorch's for a bf16 or fp16 result;
    for fp32 (and fp64) at most the larger of 1.5 times plain PyTorch's and ``noise``. The largest single error: at most
    twice plain PyTorch's (for fp32, where that is below the rounding noise of one sum, at most eight times ``noise``).
    Where the oracle is NaN the result must be NaN, and nowhere else.

    Args:
        result: what a kernel computed.
        oracle: the same in float64.
        plain: the same in plain PyTorch in the sample's dtype.
        noise: √K · ε/2 · the terms' norm of a float32 or float64 result, see :func:`low_rank_terms`.
        what: named in the message.

    Raises:
        AssertionError: the rule is broken; the message has the numbers.
    """
    if result.shape != oracle.shape:
        raise AssertionError(f"{what} has shape {tuple(result.shape)}, the oracle {tuple(oracle.shape)}")
    finite = oracle.isfinite()
    if not torch.equal(result.isfinite(), finite):
        wrong = (result.isfinite() != finite).nonzero()
        at = wrong[0].tolist()
        raise AssertionError(
            f"{what} and the oracle differ in where they are NaN or infinite, at {len(wrong)} elements: "
            f"at {at} it is {result[tuple(at)].item()}, the oracle {oracle[tuple(at)].item()}"
        )
    want = oracle.double()[finite]
    error, yardstick = (t.detach().double()[finite] - want for t in (result, plain))
    half = result.dtype in (torch.bfloat16, torch.float16)
    if half:
        limit, largest = 1.05 * rms(yardstick), 2 * _largest(yardstick)
    else:
        limit, largest = max(1.5 * rms(yardstick), noise), max(2 * _largest(yardstick), 8 * noise)
    size = rms(want) or 1.0
    if rms(error) > limit:
        raise AssertionError(
            f"{what}: relative RMS error {rms(error) / size:.3e}, allowed {limit / size:.3e} "
            f"(plain PyTorch {rms(yardstick) / size:.3e})"
        )
    if _largest(error) > largest:
        raise AssertionError(
            f"{what}: largest error {_largest(error):.3e}, allowed {largest:.3e} "
            f"(plain PyTorch {_largest(yardstick):.3e})"
        )


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's CPU ops, the package's own among them, with ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fill every uninitialised allocation with NaN (integers with their largest value), in Python and in C++.

    An output lane that a kernel forgets to write then shows. Uses torch's fill of uninitialised memory, which works
    only with deterministic algorithms on, so both are on inside.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
