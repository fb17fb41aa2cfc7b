"""Means, paired differences and shares, beside numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from neft.errors import InputError
from neft.statistics import paired, share, spread


def test_spread_divides_by_one_less_than_the_count() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.deviation == pytest.approx(math.sqrt(7))
    assert spread([5.0]).deviation is None
    with pytest.raises(InputError, match="no values"):
        spread([])


def test_paired_differences_leave_out_what_only_one_has() -> None:
    values, reference = {"a": 3.0, "b": 5.0, "c": 4.0, "d": 100.0}, {"a": 1.0, "b": 2.0, "c": 3.0, "e": -100.0}
    found = paired(values, reference)
    assert found is not None
    # Differences 2, 3, 1: mean 2, s = 1, error 1/sqrt 3; t(0.975, 2) = 4.302653.
    assert (found.mean, found.count) == (2.0, 3)
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.beyond_noise is False


def test_a_difference_is_beyond_noise_when_its_interval_leaves_zero_out() -> None:
    found = paired({0: 1.0, 1: 1.1, 2: 0.9}, {0: 0.0, 1: 0.0, 2: 0.0})
    # Mean 1, s = 0.1: the interval is 1 +- 0.248.
    assert found is not None and found.beyond_noise is True
    assert found.low == pytest.approx(1 - 4.302653 * 0.1 / math.sqrt(3), abs=1e-5)


def test_too_few_pairs_say_nothing_of_noise() -> None:
    found = paired({0: 1.0}, {0: 0.0})
    assert found is not None and found.mean == 1.0 and found.beyond_noise is None
    assert paired({0: 1.0}, {1: 0.0}) is None


def test_a_share_above_chance_takes_chance_from_both() -> None:
    scores, full, chance = {"x": 0.75, "y": 0.6}, {"x": 1.0, "y": 0.8}, {"x": 0.5, "y": 0.4}
    plain, above = share(scores, full), share(scores, full, chance)
    assert plain is not None and above is not None
    assert plain.mean == pytest.approx(0.75)
    assert above.mean == pytest.approx(0.5)
    # All shares are the same, so nothing spreads.
    assert above.low == pytest.approx(0.5) and above.high == pytest.approx(0.5)


def test_a_share_of_nothing_above_chance_is_left_out() -> None:
    found = share({"x": 0.6, "y": 0.6}, {"x": 0.5, "y": 0.7}, {"x": 0.5, "y": 0.5})
    assert found is not None and found.count == 1
    assert found.mean == pytest.approx(0.5)
    assert found.low is None
    assert share({"x": 0.6}, {"x": 0.5}, {"x": 0.5}) is None


def test_the_interval_of_shares_holds_the_mean_and_lies_within_them() -> None:
    scores = {number: number / 10 for number in range(1, 10)}
    found = share(scores, dict.fromkeys(scores, 1.0))
    assert found is not None and found.low is not None and found.high is not None
    assert found.mean == pytest.approx(0.5)
    assert 0.1 < found.low < 0.5 < found.high < 0.9
    # About the normal interval: 0.5 +- 1.96 x 0.258 / 3.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.258 / 3, abs=0.04)
