"""One computation by several providers: each result checked, then all timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from roofs import Roofs, Work, bound
from torch import Tensor

from lora_kernels.testing import assert_within_rule, ratio, rms, take_turns

OURS = "lora_kernels"


@dataclass(frozen=True)
class Rounds:
    """How often a case is timed: ``seconds`` long, but at least and at most that often."""

    fewest: int
    most: int
    seconds: float = math.inf


@dataclass(frozen=True)
class Case:
    """A case after it was timed.

    Attributes:
        group: its name.
        times: seconds by provider, one a round.
        work: the least that each provider must do, where that is known.
        rates: bytes or FLOPs a second of the probes timed with it.
        info: what else is to be said of it.
    """

    group: str
    times: dict[str, list[float]]
    work: Mapping[str, Work] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, object] = field(default_factory=dict)

    def extra_info(self, provider: str) -> dict[str, object]:
        """What the result of ``provider`` says besides its times.

        ``ratios`` has, for each other provider, the median of each round's time over that provider's time, and the
        ends of its 95 % interval.
        """
        own = self.times[provider]
        others = {name: ratio(own, taken) for name, taken in self.times.items() if name != provider}
        found = {**self.info, "provider": provider, "ratios": others, "rates": self.rates}
        if provider in self.work:
            work = self.work[provider]
            found |= {"flops": work.flops, "bytes": work.bytes, "bound": bound(work, self.rates)}
        return found


def check(results: Mapping[str, Tensor], oracle: Tensor, plain: Tensor, *, noise: float = 0.0, what: str = "") -> None:
    """Refuse to time what computes something else.

    Ours is held to the package's error rule, another provider to twice the error of ``plain``.

    Raises:
        AssertionError: with the provider and the error.
    """
    for name, result in results.items():
        if name == OURS:
            assert_within_rule(result, oracle, plain, noise=noise, what=f"{name} {what}")
            continue
        error, allowed = rms(result.double() - oracle), max(2 * rms(plain.double() - oracle), noise)
        if not error <= allowed:
            raise AssertionError(f"{name} {what}: RMS error {error:.3e}, allowed {allowed:.3e}")


@torch.no_grad()
def compare(
    group: str,
    steps: Mapping[str, Callable[[], float]],
    rounds: Rounds,
    *,
    roofs: Roofs | None = None,
    probes: tuple[str, ...] = (),
    work: Mapping[str, Work] | None = None,
    **info: object,
) -> Case:
    """Time ``steps``, seconds each, and ``probes`` of ``roofs`` in turns."""
    turns = [*steps.values(), *((lambda name=name: roofs.probe(name)) for name in probes)]
    taken = take_turns(turns, fewest=rounds.fewest, most=rounds.most, seconds=rounds.seconds)
    times = dict(zip(steps, taken, strict=False))
    rates = roofs.rates(dict(zip(probes, taken[len(steps) :], strict=True))) if roofs else {}
    return Case(group, times, work or {}, rates, info)
