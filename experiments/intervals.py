"""Differences between arms, seed by seed: their intervals, and how many seeds it takes to see one."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 10_000


class Difference(NamedTuple):
    """Of an arm to the reference: the mean over the seeds that both have, and an interval.

    The interval is Student's for paired observations, at a level such that all intervals of a comparison hold together
    with 95 % (Bonferroni): 1 − 0.05/m for m differences. Not known, and NaN, for less than two seeds.
    """

    mean: float
    low: float
    high: float
    deviation: float
    """Sample standard deviation of the single differences."""
    pairs: int


def paired(values: Mapping[int, float], reference: Mapping[int, float], comparisons: int = 1) -> Difference:
    """The difference of values to a reference, both by seed.

    Args:
      values: of the arm.
      reference: of the other.
      comparisons: m, how many differences are looked at together.

    Example:
      >>> difference = paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
      >>> difference.mean, difference.deviation, difference.pairs
      (2.0, 1.0, 3)
      >>> print(round(difference.high, 3))  # 2 + 4.303 / √3
      4.484
    """
    both = sorted(values.keys() & reference.keys())
    differences = np.array([values[seed] - reference[seed] for seed in both])
    if len(both) < 2:
        return Difference(float(differences.mean()) if both else math.nan, math.nan, math.nan, math.nan, len(both))
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    half = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, len(both) - 1)) * deviation / math.sqrt(len(both))
    return Difference(mean, mean - half, mean + half, deviation, len(both))


def seeds_needed(deviation: float, difference: float, comparisons: int = 1) -> int | None:
    """How many seeds a paired t test needs, to find a true difference with a probability of 80 %.

    Args:
      deviation: of the single differences, from a pilot.
      difference: to be found.
      comparisons: m; the test is at the level 0.05/m.

    Returns:
      The smallest number from two on; None for an unknown deviation, or beyond 10,000.

    Example:
      >>> seeds_needed(deviation=1.0, difference=1.0)
      10
    """
    if not math.isfinite(deviation):
        return None
    low, high = 1, MOST_SEEDS + 1  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(middle, deviation, difference, comparisons) >= POWER else (middle, high)
    return high if high <= MOST_SEEDS else None


def _power(seeds: int, deviation: float, difference: float, comparisons: int) -> float:
    if deviation == 0:
        return 1.0
    critical = stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, seeds - 1)
    shift = abs(difference) / deviation * math.sqrt(seeds)
    return float(stats.nct.sf(critical, seeds - 1, shift))  # the other tail would be the wrong direction
