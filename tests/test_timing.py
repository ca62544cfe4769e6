import math

import pytest

from lora_kernels.testing import ratio, take_turns


def test_each_round_begins_with_the_next_step_and_the_first_does_not_count():
    order = []

    def step(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    assert take_turns([step("a", 1.0), step("b", 2.0), step("c", 3.0)], fewest=4, most=4) == [
        [1.0] * 4,
        [2.0] * 4,
        [3.0] * 4,
    ]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize("seconds, rounds", [(0.0, 3), (math.inf, 7)])
def test_rounds_end_with_the_time_but_not_below_the_fewest(seconds, rounds):
    assert take_turns([lambda: 1.0], fewest=3, most=7, seconds=seconds) == [[1.0] * rounds]


@pytest.mark.parametrize("n, low, high", [(1, 1, 1), (5, 1, 5), (6, 1, 6), (15, 4, 12), (31, 10, 22)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(n, low, high):
    values = [float((7 * i) % n + 1) for i in range(n)] if n % 7 else [float(i + 1) for i in range(n)]
    assert sorted(values) == [float(i + 1) for i in range(n)]
    middle, *ends = ratio([2 * v for v in values], [2.0] * n)
    assert (middle, *ends) == ((n + 1) / 2, low, high)


def test_a_ratio_is_taken_round_by_round():
    assert ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])[0] == 2.0
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])
