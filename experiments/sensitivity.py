"""How accuracy depends on CR-SAM's settings: ρ × α for two forms of the penalty, and δ × κ, as heat maps."""

import itertools
from pathlib import Path
from typing import NamedTuple

from experiments import plots, tables
from experiments.compare import compare
from experiments.configs import Compare, Run
from experiments.jobs import Result
from experiments.recipes import Recipe
from experiments.tables import mean_and_deviation


class Axis(NamedTuple):
    """A setting of the recipe, its sign in formulas, and the values that are tried."""

    key: str
    sign: str
    values: tuple[float, ...]


class Grid(NamedTuple):
    """A heat map: all combinations of two settings, the others at the recipe's values."""

    title: str
    across: Axis
    up: Axis
    fixed: str = ""


_RHO = Axis("crsam.rho", "ρ", (0.05, 0.1, 0.2, 0.4, 0.8))
_ALPHA = Axis("crsam.alpha", "α", (0.01, 0.03, 0.1, 0.3, 1.0))
_OFFSET = Axis("crsam.offset", "δ", (0.01, 0.1, 0.3, 1.0, 3.0))
_BOUND = Axis("crsam.max_penalty_ratio", "κ", (0.1, 0.3, 1.0, 3.0))

GRIDS = (
    Grid("logarithms, δ = 1", _RHO, _ALPHA),
    Grid("linear", _RHO, _ALPHA, ",crsam.penalty=linear"),
    Grid("logarithms, bounded", _OFFSET, _BOUND),
)


def sensitivity(name: str, recipe: Recipe, seeds: int, processes: int, run: Run) -> Path:
    """Trains CR-SAM at all points of the grids, and draws mean accuracy ± standard error; complete runs are read.

    Args:
      name: of the recipe, for the folder.
      recipe: what to train.
      seeds: runs of each point.
      processes: how many trainings at once.
      run: how.

    Returns:
      The folder with runs.csv, the tables of :func:`experiments.compare.compare` and sensitivity.png.
    """
    names = tuple(dict.fromkeys(_arm(grid, *point) for grid in GRIDS for point in _points(grid)))
    folder = compare(name, recipe, Compare(names, seeds, processes=processes), {}, run)
    found: dict[str, list[float]] = {}
    for row in tables.read(folder / "runs.csv", Result):
        found.setdefault(row.arm, []).append(row.test_accuracy)
    cells = [{point: mean_and_deviation(found[_arm(grid, *point)]) for point in _points(grid)} for grid in GRIDS]
    plots.heat_maps(GRIDS, cells, seeds, folder / "sensitivity.png")
    return folder


def _points(grid: Grid) -> list[tuple[float, float]]:
    return list(itertools.product(grid.across.values, grid.up.values))


def _arm(grid: Grid, x: float, y: float) -> str:
    return f"crsam,{grid.across.key}={x},{grid.up.key}={y}{grid.fixed}"
