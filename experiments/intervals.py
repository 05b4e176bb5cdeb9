"""Differences between arms, seed by seed: their intervals, and how many seeds it takes to see one."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    """The difference of values to a reference, both by seed; one of m comparisons that are looked at together.

    Example:
      >>> difference = paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
      >>> difference.mean, difference.deviation, difference.pairs
      (2.0, 1.0, 3)
      >>> print(round(difference.high, 3))  # 2 + 4.303 / √3
      4.484
    """
    differences = np.array([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])
    pairs = len(differences)
    if pairs < 2:
        return Difference(float(differences.mean()) if pairs else math.nan, math.nan, math.nan, math.nan, pairs)
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    half = float(_critical(comparisons, pairs)) * deviation / math.sqrt(pairs)
    return Difference(mean, mean - half, mean + half, deviation, pairs)


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
    seeds = np.arange(2, MOST_SEEDS + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = abs(difference) / np.float64(deviation) * np.sqrt(seeds)
    power = stats.nct.sf(_critical(comparisons, seeds), seeds - 1, shift)  # the other tail is the wrong direction
    enough = np.flatnonzero(~(power < POWER))  # NaN stands for a shift so large that the power is 1
    return int(seeds[enough[0]]) if len(enough) else None


def _critical(comparisons: int, seeds: Any) -> Any:
    return stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, seeds - 1)
