"""Does SAM gain over a base optimizer that has all its usual means? See docs/regimes.md.

Weight decay and label smoothing are searched beside the learning rate; averages of the weights and early stopping are
tried on top, for SGD and SAM alike.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from experiments.settings.configs import Compare, Run, Tune
from experiments.settings.overrides import find
from experiments.settings.recipes import Recipe
from experiments.settings.suggestions import check_names
from experiments.studies import study
from experiments.studies.compare import compare
from experiments.studies.jobs import Job, Result
from experiments.studies.summary import accuracies, paired, with_interval
from experiments.studies.tune import tune
from experiments.system import files, tables
from experiments.system.tables import mean_and_deviation
from experiments.training.logs import read_epochs

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")]

METHODS = ("base", "sam")

AVERAGES = ("", ",ema=0.99", ",swa_start=0.75")
"""Added to an arm's name: no average of the weights, EMA, or SWA of the last quarter."""

SPACE = ("weight_decay=1e-5:1e-1", "label_smoothing=0.01:0.5")
"""Searched for the strong arms, beside learning rate and ρ."""

FIRST_SEED = 2200
"""Comparisons begin here: seeds that neither searches nor other experiments have used."""

TASKS: dict[str, Recipe] = {name: study.TASKS[name].recipe for name in ("digits", "fashion-noise", "cifar10-augmented")}

Accuracies = Mapping[int, float]
"""Test accuracies in percent, by seed."""


class Accuracy(NamedTuple):
    """A row of accuracies.csv: a run's test accuracy in percent, of which stronger.csv is made."""

    task: str
    arm: str
    seed: int
    accuracy: float


class Row(NamedTuple):
    """An arm of stronger.csv. Gains are in points, paired by seed, with Student's 95 % intervals, not adjusted."""

    task: str
    arm: str
    seeds: int
    accuracy: float
    deviation: float
    over_plain: float
    """Over the base optimizer whose learning rate alone was searched."""
    over_plain_low: float
    over_plain_high: float
    over_strong: float
    """Over the base optimizer with the same means: searched alike, with the same average or early stopping."""
    over_strong_low: float
    over_strong_high: float


def stronger(
    names: Names,
    processes: int = 1,
    out: Path = Path("results/stronger"),
    trials: int = 32,
    trial_seeds: int = 2,
    seeds: int = 20,
) -> None:
    """Compare SGD and SAM with weight decay and label smoothing searched, averages and early stopping; or resume it.

    Args:
        names: The tasks: digits, fashion-noise, cifar10-augmented.
        processes: Run so many trainings at once, one core each.
        out: Folder of the results.
        trials: Settings tried for each method, in each of the two searches.
        trial_seeds: Runs of each setting.
        seeds: Fresh runs of each arm.
    """
    check_names("task", names, TASKS)
    runs, rows = list[Accuracy](), list[Row]()
    for name in names:
        found = _accuracies_of(
            name, TASKS[name], out / name, Tune(METHODS, trials, trial_seeds, processes=processes), seeds
        )
        runs += (Accuracy(name, arm, seed, one) for arm, seeds_of in found.items() for seed, one in seeds_of.items())
        rows += compared(name, found)
        tables.write(out / "accuracies.csv", runs)
        write_rows(rows, out)
    tables.show((out / "stronger.md").read_text())


def _accuracies_of(name: str, recipe: Recipe, folder: Path, search: Tune, seeds: int) -> dict[str, Accuracies]:
    """Trains everything of a task: the accuracies by arm, those searched in full as ``strong``."""
    quick = Run(keep=None, log_steps=0, probe_examples=0)
    plain_arms = Compare(METHODS, seeds, FIRST_SEED, processes=search.processes)
    strong_arms = dataclasses.replace(plain_arms, methods=tuple(m + a for a in AVERAGES for m in METHODS))

    def tuned(kind: str, start: Recipe, space: tuple[str, ...]) -> Recipe:
        run = dataclasses.replace(quick, out=folder / f"tune-{kind}")
        return find(str(tune(name, start, dataclasses.replace(search, space=space), {}, run) / f"{name}-tuned.json"))

    def trained(kind: str, start: Recipe, arms: Compare, every: int = 1) -> Path:
        return compare(name, start, arms, {}, dataclasses.replace(quick, out=folder / kind, evaluate_every=every))

    plain = tuned("plain", recipe, ())
    strong = tuned("strong", dataclasses.replace(recipe, label_smoothing=0.1), SPACE)
    on_held_out = dataclasses.replace(strong, evaluate_on="validation")
    first = trained("plain", plain, plain_arms, plain.epochs)
    last = trained("strong", strong, strong_arms)
    held_out = trained("strong-held-out", on_held_out, plain_arms)
    found = {f"plain {method}": _of(first, method) for method in METHODS}
    found |= {f"strong {method}{average}": _of(last, method + average) for average in AVERAGES for method in METHODS}
    for method in METHODS:
        found[f"strong {method},stopped"] = {
            seed: stopped_early(*(Job.inside(where, method, strong, seed).folder for where in (held_out, last)))
            for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        }
    return found


def _of(folder: Path, arm: str) -> Accuracies:
    return accuracies(tables.read(folder / "runs.csv", Result), arm)


def stopped_early(held_out: Path, test: Path) -> float:
    """The test accuracy after the epoch whose accuracy on held-out data was the highest, the first of several.

    The two folders have the same run, evaluated on different data.
    """
    rows = read_epochs(held_out / "metrics.csv")
    best = max(rows, key=lambda row: row.test_accuracy).epoch
    [accuracy] = [row.test_accuracy for row in read_epochs(test / "metrics.csv") if row.epoch == best]
    return accuracy


def compared(task: str, found: Mapping[str, Accuracies]) -> list[Row]:
    """The rows of a task: each arm against plain SGD, and each arm of SAM against SGD with the same means.

    Example:
      >>> found = {"plain base": {0: 50.0, 1: 60.0}, "plain sam": {0: 51.0, 1: 63.0}}
      >>> base, sam = compared("digits", found)
      >>> sam.accuracy, sam.over_plain, sam.over_strong
      (57.0, 2.0, 2.0)
    """
    rows = []
    for arm, values in found.items():
        mean, deviation = mean_and_deviation([*values.values()])
        plain, strong = (paired(values, found[other])[:3] for other in ("plain base", arm.replace(" sam", " base")))
        rows.append(Row(task, arm, len(values), mean, deviation, *plain, *strong))
    return rows


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """Writes stronger.csv and stronger.md."""
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(folder / "stronger.csv", rows)
    lines = []
    for row in rows:
        plain = with_interval(row.over_plain, row.over_plain_low, row.over_plain_high)
        strong = with_interval(row.over_strong, row.over_strong_low, row.over_strong_high)
        accuracy = f"{row.accuracy:.1f} ± {row.deviation:.1f}"
        is_base = " base" in row.arm
        lines.append(
            [row.task, row.arm, accuracy, "–" if row.arm == "plain base" else plain, "–" if is_base else strong]
        )
    titles = ["task", "arm", "accuracy %", "over plain SGD, points", "SAM over SGD with the same means"]
    files.replace(folder / "stronger.md", tables.markdown(titles, lines))
