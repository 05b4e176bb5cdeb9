"""How accuracy depends on CR-SAM's settings: ρ × α for two forms of the penalty, and δ × κ, as heat maps."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.figures import style
from experiments.settings.configs import Compare, Run
from experiments.settings.recipes import Recipe
from experiments.studies.compare import compare
from experiments.studies.jobs import Result
from experiments.system import tables
from experiments.system.tables import mean_and_deviation


class Axis(NamedTuple):
    """A setting of the recipe, its symbol in formulas, and the values that are tried."""

    key: str
    sign: str
    values: tuple[float, ...]


class Grid(NamedTuple):
    """A heat map: all combinations of two settings, the others at the recipe's values."""

    title: str
    across: Axis
    up: Axis
    fixed: str = ""

    def arm(self, x: float, y: float) -> str:
        """What is trained for a point."""
        return f"crsam,{self.across.key}={x},{self.up.key}={y}{self.fixed}"


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

    Returns the folder with runs.csv, the tables of :func:`experiments.studies.compare.compare` and sensitivity.png.
    """
    names = tuple(grid.arm(x, y) for grid in GRIDS for x in grid.across.values for y in grid.up.values)
    folder = compare(name, recipe, Compare(names, seeds, processes=processes), {}, run)
    rows = tables.read(folder / "runs.csv", Result)
    found = {arm: mean_and_deviation([row.test_accuracy for row in rows if row.arm == arm]) for arm in names}
    heat_maps(found, seeds, folder / "sensitivity.png")
    return folder


def heat_maps(found: Mapping[str, tuple[float, float]], seeds: int, path: Path) -> None:
    """Draws each arm's mean accuracy as a colour, on one scale, with its standard error in figures."""
    low, high = (end(mean for mean, _ in found.values()) for end in (min, max))
    with style.drawn(path, height=3, width=3.2 * len(GRIDS)) as figure:
        axes = figure.subplots(1, len(GRIDS), squeeze=False)[0]
        for axis, grid in zip(axes, GRIDS, strict=True):
            xs, ys = grid.across.values, grid.up.values
            values = [[found[grid.arm(x, y)][0] for x in xs] for y in ys]
            image = axis.imshow(values, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="viridis")
            for (column, x), (row, y) in itertools.product(enumerate(xs), enumerate(ys)):
                mean, deviation = found[grid.arm(x, y)]
                color = "white" if mean < (low + high) / 2 else "black"
                text = f"{mean:.1f}\n±{deviation / np.sqrt(seeds):.1f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
            axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
            axis.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
            axis.set(title=grid.title, xlabel=grid.across.sign, ylabel=grid.up.sign)
        figure.colorbar(image, ax=axes, label="test accuracy, %")
