"""Times that can be compared: everything takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence


def take_turns(
    steps: Sequence[Callable[[], float]], *, fewest: int, most: int, seconds: float = math.inf
) -> list[list[float]]:
    """Run all ``steps`` in turns, each round beginning with the next one, after a round that does not count.

    Args:
        steps: each runs something once and returns how long it took, in seconds.
        fewest, most: bounds on the number of rounds.
        seconds: no round begins after that long, once there are ``fewest``.

    Returns:
        The times of each step, one a round.
    """
    for step in steps:
        step()
    count = len(steps)
    taken: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    for i in range(most):
        if i >= fewest and time.perf_counter() > end:
            break
        for j in range(count):
            taken[(i + j) % count].append(steps[(i + j) % count]())
    return taken


def ratio(times: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median of each round's ``times / others``, and the ends of an interval of that median.

    The interval lies between two of the sorted ratios: the median is outside the k-th from either end with probability
    2 P(Binomial(rounds, ½) < k), whatever the distribution. With fewer than 6 rounds it is all of them.
    """
    ratios = sorted(own / other for own, other in zip(times, others, strict=True))
    n = len(ratios)
    outside, k = 2 * 0.5**n, 0
    while k + 1 <= n // 2 and outside + 2 * math.comb(n, k + 1) * 0.5**n <= 1 - confidence:
        k += 1
        outside += 2 * math.comb(n, k) * 0.5**n
    return statistics.median(ratios), ratios[k], ratios[n - 1 - k]
