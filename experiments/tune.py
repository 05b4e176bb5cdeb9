"""A search for the settings of each arm, with equally many trials, on data that is held out of training."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc

from experiments import arms, jobs, plots, ranges, runs, tables
from experiments.configs import Run, Tune
from experiments.jobs import Job
from experiments.optimizers import METHODS
from experiments.overrides import Changes, changed
from experiments.ranges import flat
from experiments.recipes import Recipe
from experiments.tables import mean_and_deviation

FIRST_SEED = 100
"""Comparisons begin with 0."""

SPACE = {
    "sam.rho": (0.02, 1.0), "asam.rho": (0.1, 5.0), "msam.rho": (0.1, 5.0), "s2sam.rho": (0.02, 1.0),
    "crsam.rho": (0.02, 1.0), "crsam.alpha": (0.01, 1.0), "crsam.beta": (0.001, 0.3),
}  # fmt: skip
"""Ranges of the methods' own settings. That of the learning rate is from a tenth to ten times the recipe's."""


def tune(name: str, recipe: Recipe, config: Tune, changes: Changes, run: Run) -> Path:
    """Tries settings of each arm and writes down all of them, and the recipe with the best, which can be trained.

    The best has the highest mean accuracy over the seeds on the validation data; the test data is not read. Trials
    that are complete are read, so that a search goes on where it was, or with more trials. The ``changes`` hold for all
    arms. Returns the folder with trials.csv, runs.csv, trials.png and NAME-tuned.json.

    Raises:
      FileExistsError: if the folder holds a search over other ranges.
      ValueError: for an unknown method or setting, or a range that is none.
    """
    ranges.check(config, run)
    folder = run.out or Path("results") / name / "tune"
    common, seeds = changed(recipe, changes), range(FIRST_SEED, FIRST_SEED + config.seeds)
    spaces: dict[str, dict[str, tuple[float, float]]] = {}
    searches: dict[str, list[list[Job]]] = {}  # of each arm, for each trial, a job a seed
    for arm in dict.fromkeys(config.methods):
        own = arms.resolve(recipe, arm, dict(changes) | {"evaluate_on": "validation"}, FIRST_SEED)
        spaces[arm] = space_of(own.method, common.learning_rate, config.space)
        trials = enumerate(changed(own, point) for point in sample(spaces[arm], config.trials))
        searches[arm] = [[Job.inside(folder / f"trial{i}", arm, one, seed) for seed in seeds] for i, one in trials]
    # Trial by trial over all arms, so that an interruption leaves searches of one size.
    todo = [job for trial in zip(*searches.values(), strict=True) for group in trial for job in group]
    short = dataclasses.replace(run, evaluate_every=max(job.recipe.epochs for job in todo), probe_examples=0)
    jobs.carry_out(name, todo, short, config.processes)
    best: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for arm, search in searches.items():
        rows[arm] = [_row(arm, trial, group, spaces[arm]) for trial, group in enumerate(search)]
        winner = max(rows[arm], key=lambda row: row["accuracy"])
        best[arm] = _difference(search[winner["trial"]][0].recipe, common)
        settings = ", ".join(f"{key} = {winner[key]:g}" for key in spaces[arm])
        print(f"{arm}: {winner['accuracy']:.2f} % with {settings}")
    tables.write(folder / "trials.csv", [row for found in rows.values() for row in found])
    tables.write(folder / "runs.csv", [jobs.read_result(job) for job in todo])
    plots.trials(rows, list(dict.fromkeys(key for space in spaces.values() for key in space)), folder / "trials.png")
    tuned = dataclasses.replace(common, per_method=common.per_method | best)
    runs.save_json(dataclasses.asdict(tuned), folder / f"{name}-tuned.json")
    print(f"Trials and the best are in {folder}: trials.csv, runs.csv, trials.png, {name}-tuned.json.")
    return folder


def space_of(method: str, rate: float, ranges: Sequence[str] = ()) -> dict[str, tuple[float, float]]:
    """The ranges that are searched for a method, that of its learning rate around the ``rate`` of all methods.

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


def sample(space: Mapping[str, tuple[float, float]], count: int) -> list[dict[str, float]]:
    """The first points of a scrambled Sobol sequence on the logarithms of the ranges, to three digits."""
    low, high = np.log(list(space.values())).T
    unit = qmc.Sobol(len(space), seed=0).random_base2(max(count - 1, 0).bit_length())[:count]
    points = np.exp(low + unit * (high - low))
    return [{key: float(f"{value:.3g}") for key, value in zip(space, point, strict=True)} for point in points]


def _row(arm: str, trial: int, seeds: Sequence[Job], names: Iterable[str]) -> dict[str, Any]:
    """A row of trials.csv."""
    found, settings = [jobs.read_result(job) for job in seeds], flat(seeds[0].recipe)
    accuracy, deviation = mean_and_deviation([result.test_accuracy for result in found])
    loss, _ = mean_and_deviation([result.test_loss for result in found])
    return {
        "arm": arm, "trial": trial, "accuracy": accuracy, "accuracy_std": deviation, "loss": loss,
        "seeds": len(found), "failed": sum(bool(result.error) for result in found),
    } | {key: settings[key] for key in names}  # fmt: skip


def _difference(one: Recipe, common: Recipe) -> dict[str, Any]:
    """The settings in which an arm's recipe is not that of all arms."""
    besides, ignored = flat(common), {"method", "seed", "epochs", "evaluate_on", "per_method"}
    return {key: value for key, value in flat(one).items() if key not in ignored and value != besides.get(key)}
