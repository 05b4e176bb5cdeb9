"""Where do the methods gain? A map over wrong labels and the number of images; see docs/regimes.md.

Each cell of the map is a task of its own: every method is tuned there alike, and compared with fresh seeds. All runs of
a task have the same number of steps, whatever their number of images.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from experiments.figures import style
from experiments.settings import recipes
from experiments.settings.configs import Compare, Run, Tune
from experiments.settings.overrides import find
from experiments.settings.recipes import Recipe
from experiments.settings.suggestions import check_names
from experiments.studies import arms, study
from experiments.studies.compare import compare
from experiments.studies.jobs import Result
from experiments.studies.summary import accuracies, paired, with_interval
from experiments.studies.tune import tune
from experiments.system import files, tables

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")]

METHODS = ("base", "msam", "sam", "crsam")
"""The gains of the others are over the first."""

NOISE = (0.0, 0.1, 0.2, 0.4)
"""Shares of wrong labels."""

FIRST_SEED = 2100
"""Comparisons begin here: seeds that neither searches nor other experiments have used."""


class Task(NamedTuple):
    """One map.

    Attributes:
      recipe: of all cells, but for noise, images and epochs.
      examples: training images of each of the ten classes.
      steps: of each run, in every cell.
    """

    recipe: Recipe
    examples: tuple[int, ...]
    steps: int


_DIGITS = dataclasses.replace(
    study.TASKS["digits"].recipe, batch_size=50, sam=recipes.Sam(), crsam=recipes.CrSam(), per_method={}
)

TASKS: dict[str, Task] = {
    "digits": Task(_DIGITS, (10, 25, 50), 400),
    "fashion": Task(
        dataclasses.replace(_DIGITS, dataset="fashion_mnist", validation_fraction=0.1, test_examples_per_class=500),
        (10, 50, 200),
        400,
    ),
}


class Cell(NamedTuple):
    """A row of map.csv: a method's gain in one cell, in points of accuracy."""

    task: str
    noise: float
    examples: int
    """Of each class."""
    method: str
    seeds: int
    base_accuracy: float
    """Of the base optimizer, in percent."""
    base_train_accuracy: float
    """In its last epoch, on labels of which some may be wrong."""
    gain: float
    """Over the base optimizer, paired by seed."""
    low: float
    """The interval is Student's, simultaneous over the methods of a cell (Bonferroni), at 95 %."""
    high: float


def regimes(
    names: Names,
    processes: int = 1,
    out: Path = Path("results/regimes"),
    trials: int = 8,
    trial_seeds: int = 2,
    seeds: int = 10,
) -> None:
    """Map the gain of MSAM, SAM and CR-SAM over wrong labels and the number of images; or resume it.

    Args:
        names: The tasks, digits and fashion.
        processes: Run so many trainings at once, one core each.
        out: Folder of the results.
        trials: Settings tried for each method in each cell.
        trial_seeds: Runs of each setting.
        seeds: Fresh runs of each method in each cell.
    """
    check_names("task", names, TASKS)
    for name in names:
        found: list[Cell] = []
        for noise, examples, recipe in cells(TASKS[name]):
            folder = out / name / f"noise{noise:g}-images{examples}"
            search = Tune(METHODS, trials, trial_seeds, processes=processes)
            tuned = tune(name, recipe, search, {}, Run(folder / "tune", keep=None, log_steps=0)) / f"{name}-tuned.json"
            last = Run(folder / "compare", keep=None, log_steps=0, evaluate_every=recipe.epochs, probe_examples=0)
            compared = Compare(METHODS, seeds, FIRST_SEED, against=METHODS[:1], processes=processes)
            runs = tables.read(compare(name, find(str(tuned)), compared, {}, last) / "runs.csv", Result)
            found += gains(name, noise, examples, runs)
            write_map(found, out / name)  # over whole cells, so that an interruption leaves a map
        tables.show((out / name / "map.md").read_text())


def cells(task: Task) -> Iterator[tuple[float, int, Recipe]]:
    """Noise, images of each class, and the recipe of each cell; the cells with the most images come last."""
    for examples, noise in itertools.product(task.examples, NOISE):
        epochs = task.steps // (10 * examples // task.recipe.batch_size)
        yield (
            noise,
            examples,
            dataclasses.replace(task.recipe, label_noise=noise, examples_per_class=examples, epochs=epochs),
        )


def gains(task: str, noise: float, examples: int, runs: Sequence[Result]) -> list[Cell]:
    """The gains of a cell, from the runs of its comparison.

    Example:
      >>> runs = [Result(arm, seed, "", 1, 50.0 + seed + gain, train_accuracy=90.0)
      ...         for seed in range(3) for arm, gain in (("base", 0), ("sam", 1 + seed))]
      >>> [sam] = gains("digits", 0.4, 10, runs)
      >>> sam.method, sam.seeds, sam.base_accuracy, sam.gain
      ('sam', 3, 51.0, 2.0)
    """
    base, *compared = METHODS
    reference = accuracies(runs, base)
    others = {method: values for method in compared if (values := accuracies(runs, method))}
    accuracy = float(np.mean(list(reference.values())))
    training = float(
        np.mean([row.train_accuracy for row in runs if row.arm == base and row.train_accuracy is not None])
    )
    found = []
    for method, values in others.items():
        gain = paired(values, reference, len(others))
        found.append(
            Cell(task, noise, examples, method, gain.pairs, accuracy, training, gain.mean, gain.low, gain.high)
        )
    return found


def write_map(found: Sequence[Cell], folder: Path) -> None:
    """Writes map.csv, map.md and map.png: a heat map for each method."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(found, key=lambda row: (row.noise, row.examples))
    tables.write(folder / "map.csv", found)
    methods = list(dict.fromkeys(row.method for row in found))
    labels = {method: arms.label(_DIGITS, method) for method in (METHODS[0], *methods)}
    by_cell: dict[tuple[float, int], dict[str, Cell]] = {}
    for row in found:
        by_cell.setdefault((row.noise, row.examples), {})[row.method] = row
    lines = []
    for (noise, examples), rows in by_cell.items():
        first = next(iter(rows.values()))
        start = [f"{noise:.0%}", f"{10 * examples:,}", f"{first.base_accuracy:.1f}", f"{first.base_train_accuracy:.1f}"]
        lines.append([*start, *(_gain(rows[method]) for method in methods)])
    titles = ["wrong labels", "images", labels[METHODS[0]], "its training accuracy", *(labels[m] for m in methods)]
    files.replace(folder / "map.md", tables.markdown(titles, lines))
    _draw(by_cell, methods, labels, folder / "map.png")


def _gain(row: Cell) -> str:
    return with_interval(row.gain, row.low, row.high, digits=1)


def _draw(
    by_cell: Mapping[tuple[float, int], Mapping[str, Cell]],
    methods: Sequence[str],
    labels: Mapping[str, str],
    path: Path,
) -> None:
    """Gains as colours around white at zero; in bold where the interval does not include zero."""
    noises, sizes = (sorted({key[place] for key in by_cell}) for place in (0, 1))
    most = max(abs(row.gain) for rows in by_cell.values() for row in rows.values()) or 1.0
    with style.drawn(path, height=3.2) as figure:
        axes = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
        for axis, method in zip(axes, methods, strict=True):
            values = np.full((len(noises), len(sizes)), np.nan)
            for (noise, size), rows in by_cell.items():
                row, place = rows[method], (noises.index(noise), sizes.index(size))
                values[place] = row.gain
                is_clear = row.low > 0 or row.high < 0
                text = f"{row.gain:+.1f}\n{row.low:+.1f} to\n{row.high:+.1f}".replace("-", "−")
                weight = "bold" if is_clear else "normal"
                color = "white" if abs(row.gain) > 0.6 * most else "black"
                axis.text(*place[::-1], text, ha="center", va="center", fontsize=6, weight=weight, color=color)
            image = axis.imshow(values, origin="lower", aspect="auto", vmin=-most, vmax=most, cmap="PuOr")
            axis.set_xticks(range(len(sizes)), [f"{10 * size:,}" for size in sizes])
            axis.set_yticks(range(len(noises)), [f"{noise:.0%}" for noise in noises])
            axis.set(title=labels[method], xlabel="training images")
            axis.grid(visible=False)
        axes[0].set_ylabel("wrong labels")
        figure.colorbar(image, ax=axes, label=f"gain over {labels[METHODS[0]]}, points")
