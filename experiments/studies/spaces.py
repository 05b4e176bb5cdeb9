"""The points that a search tries: ranges of settings, and scrambled Sobol sequences on their logarithms."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import qmc

from experiments.training.optimizers import METHODS

Space = dict[str, tuple[float, float]]
"""Ranges by setting."""
Point = dict[str, float]

WIDTH = 0.25
"""The share of each range in which the second round searches around a point."""

SPACE = {
    "sam.rho": (0.02, 1.0),
    "asam.rho": (0.1, 5.0),
    "msam.rho": (0.1, 5.0),
    "s2sam.rho": (0.02, 1.0),
    "crsam.rho": (0.02, 1.0),
    "crsam.alpha": (0.01, 1.0),
    "crsam.beta": (0.001, 0.3),
}
"""Ranges of the methods' own settings. That of the learning rate is from a tenth to ten times the recipe's."""


def space_of(method: str, rate: float, ranges: Sequence[str] = ()) -> Space:
    """The ranges that are searched for a method; its learning rate is searched around the ``rate`` of all methods.

    Others are given as ``key=low:high``; a setting that is no method's own is searched for all of them.

    Example:
      >>> space_of("base", 0.1, ["learning_rate=0.01:1", "weight_decay=1e-5:1e-3", "sam.rho=0.1:0.2"])
      {'learning_rate': (0.01, 1.0), 'weight_decay': (1e-05, 0.001)}
    """
    default = SPACE | {"learning_rate": (rate / 10, rate * 10)}
    space = {key: default[key] for key in ("learning_rate", *METHODS[method].tunes)}
    for text in ranges:
        key, _, ends = text.partition("=")
        try:
            low, high = map(float, ends.split(":"))
        except ValueError:
            low = high = 0.0
        if not 0 < low < high:
            raise ValueError(f"A range is key=low:high with 0 < low < high, got {text!r}.")
        if key in space or key not in SPACE:
            space[key] = (low, high)
    return space


def sample(space: Space, count: int, seed: int | np.random.Generator = 0) -> list[Point]:
    """The first points of a scrambled Sobol sequence on the logarithms of the ranges, to three digits."""
    return _scaled(space, _unit_points(len(space), count, seed))


def shared_sample(spaces: Mapping[str, Space], count: int, seed: int = 0) -> dict[str, list[Point]]:
    """Points of each arm: the same place of the learning rate's range for all arms, and the same place of ρ's range.

    So are settings of all arms, such as the weight decay; settings of single methods other than ρ are left out.

    Example:
      >>> spaces = {arm: space_of(arm, 0.1) for arm in ("base", "sam", "crsam")}
      >>> for points in shared_sample(spaces, 2).values():
      ...     print(points[0])
      {'learning_rate': 0.503}
      {'learning_rate': 0.503, 'sam.rho': 0.765}
      {'learning_rate': 0.503, 'crsam.rho': 0.765}
    """
    shared = {arm: {key: space[key] for key in space if _is_shared(key)} for arm, space in spaces.items()}
    names = list(dict.fromkeys(_common_name(key) for space in shared.values() for key in space))
    unit = _unit_points(len(names), count, seed)
    return {
        arm: _scaled(space, unit[:, [names.index(_common_name(key)) for key in space]]) for arm, space in shared.items()
    }


def neighbourhood(space: Space, point: Point) -> Space:
    """Where the second round searches: settings of the point within a quarter of the range around it, others anywhere.

    What is found at the end of a range may be left behind: the quarter is not cut off there.

    Example:
      >>> neighbourhood({"sam.rho": (0.01, 100.0), "crsam.alpha": (0.1, 1.0)}, {"sam.rho": 1.0})
      {'sam.rho': (0.31622776601683794, 3.1622776601683795), 'crsam.alpha': (0.1, 1.0)}
    """
    half = {key: (high / low) ** (WIDTH / 2) for key, (low, high) in space.items()}
    return {key: (point[key] / half[key], point[key] * half[key]) if key in point else space[key] for key in space}


def _unit_points(dimensions: int, count: int, seed: int | np.random.Generator) -> np.ndarray:
    return qmc.Sobol(dimensions, seed=seed).random_base2(max(count - 1, 0).bit_length())[:count]


def _scaled(space: Space, unit: np.ndarray) -> list[Point]:
    low, high = np.log(list(space.values())).T
    points = np.exp(low + unit * (high - low))
    return [{key: float(f"{value:.3g}") for key, value in zip(space, point, strict=True)} for point in points]


def _is_shared(key: str) -> bool:
    return key.endswith(".rho") or key not in SPACE


def _common_name(key: str) -> str:
    return "rho" if key.endswith(".rho") else key
