"""Means over runs with their spread, differences of paired runs beside their noise, and shares of a score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

from neft.errors import InputError

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (n - 1; None for a single value) and count of some values."""

    mean: float
    deviation: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    """
    Raises:
        InputError: no values.
    """
    if not values:
        raise InputError("there are no values to take the mean of; run something first")
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Difference:
    """Mean of the differences of `count` pairs, its standard error, and its 95 % interval by Student's t.

    With fewer than two pairs there is no error and no interval.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the interval leaves zero out; None when there are too few pairs to say."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


def paired(values: Mapping[_Key, float], reference: Mapping[_Key, float], level: float = 0.95) -> Difference | None:
    """Difference of `values` to `reference`, paired where both have a value; None where they share none.

    The interval is mean +- t(level, n-1) s / sqrt(n), with s the standard deviation of the differences. Pairs that all
    differ by the same have no noise to be told from, and an interval of no width.
    """
    gaps = [value - reference[key] for key, value in values.items() if key in reference]
    if not gaps:
        return None
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return Difference(mean, None, None, None, len(gaps))
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    reach = float(stats.t.ppf((1 + level) / 2, len(gaps) - 1)) * error
    return Difference(mean, error, mean - reach, mean + reach, len(gaps))


@dataclass(frozen=True)
class Share:
    """A method's score as a share of a reference's, and its bootstrap interval (None for a single value)."""

    mean: float
    low: float | None
    high: float | None
    count: int


def share(
    scores: Mapping[_Key, float], reference: Mapping[_Key, float], chance: Mapping[_Key, float] | None = None
) -> Share | None:
    """Mean of score / reference score over what both have, with a 95 % interval by the bias-corrected bootstrap.

    Args:
        chance: what chance gives; with it, the mean of (score - chance) / (reference - chance). Where the reference
            is not above chance the share has no meaning, and it is left out.
    """
    base = chance or {}
    shares = [
        (score - base.get(key, 0.0)) / (reference[key] - base.get(key, 0.0))
        for key, score in scores.items()
        if key in reference and reference[key] > base.get(key, 0.0)
    ]
    if not shares:
        return None
    mean = statistics.mean(shares)
    if len(shares) < 2 or max(shares) - min(shares) < 1e-12:
        same = mean if len(shares) > 1 else None
        return Share(mean, same, same, len(shares))
    drawn = stats.bootstrap((np.array(shares),), np.mean, rng=np.random.default_rng(0), n_resamples=9999)
    interval = drawn.confidence_interval
    return Share(mean, float(interval.low), float(interval.high), len(shares))
