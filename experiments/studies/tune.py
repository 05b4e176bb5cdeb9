"""A search for the settings of each arm, with equally many trials, on data that is held out of training."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import plots
from experiments.settings import ranges
from experiments.settings.configs import Run, Tune
from experiments.settings.overrides import Changes, changed
from experiments.settings.ranges import flat
from experiments.settings.recipes import Recipe
from experiments.studies import arms, jobs
from experiments.studies.jobs import Job
from experiments.studies.spaces import Point, Space, neighbourhood, sample, shared_sample, space_of
from experiments.system import tables
from experiments.system.tables import mean_and_deviation
from experiments.training import run_folder

FIRST_SEED = 100
"""Comparisons begin with 0."""

BEST = 4
"""The second round searches around so many trials."""


def tune(name: str, recipe: Recipe, config: Tune, changes: Changes, run: Run) -> Path:
    """Tries settings of each arm and writes down all of them, and the recipe with the best, which can be trained.

    The best has the highest mean accuracy over the seeds on the validation data; the test data is not read. Trials
    that are complete are read, so that a search resumes, or grows by more trials; a second round can only grow while
    the best four of the first stay the same. The ``changes`` hold for all arms. Returns the folder with trials.csv,
    runs.csv, trials.png and NAME-tuned.json.

    Raises:
      FileExistsError: if the folder holds a search over other ranges.
      ValueError: for an unknown method or setting, or a range that is none.
    """
    ranges.check(config, run)
    folder = run.out or Path("results") / name / "tune"
    first = FIRST_SEED + config.sobol_seed * config.seeds
    common, seeds = changed(recipe, changes), range(first, first + config.seeds)
    own, spaces = dict[str, Recipe](), dict[str, Space]()
    for arm in dict.fromkeys(config.methods):
        own[arm] = arms.resolve(recipe, arm, dict(changes) | {"evaluate_on": "validation"}, FIRST_SEED)
        spaces[arm] = space_of(own[arm].method, common.learning_rate, config.space)

    def searched(points: Mapping[str, Sequence[Point]], title: str) -> dict[str, list[list[Job]]]:
        """A round of the search: of each arm, for each point, a job per seed."""
        found = {
            arm: [
                [Job.inside(folder / f"{title}{i}", arm, changed(own[arm], point), seed) for seed in seeds]
                for i, point in enumerate(tried)
            ]
            for arm, tried in points.items()
        }
        todo = _in_turn(found)
        short = dataclasses.replace(run, evaluate_every=max(job.recipe.epochs for job in todo), probe_examples=0)
        jobs.carry_out(name, todo, short, config.processes)
        return found

    points = _first_points(spaces, config)
    rounds = [searched(points, "trial")]
    if config.second_round:
        around = {
            arm: _second_points(spaces[arm], points[arm], [_accuracy(group) for group in groups], config)
            for arm, groups in rounds[0].items()
        }
        rounds.append(searched(around, "second"))
    best: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for arm, space in spaces.items():
        search = [(number, group) for number, found in enumerate(rounds, start=1) for group in found[arm]]
        rows[arm] = [_row(arm, trial, number, group, space) for trial, (number, group) in enumerate(search)]
        winner = max(rows[arm], key=lambda row: row["accuracy"])
        best[arm] = _difference(search[winner["trial"]][1][0].recipe, common)
        settings = ", ".join(f"{key} = {winner[key]:g}" for key in space)
        print(f"{arm}: {winner['accuracy']:.2f} % with {settings}")
    tables.write(folder / "trials.csv", [row for found in rows.values() for row in found])
    tables.write(folder / "runs.csv", [jobs.read_result(job) for found in rounds for job in _in_turn(found)])
    plots.trials(rows, list(dict.fromkeys(key for space in spaces.values() for key in space)), folder / "trials.png")
    tuned = dataclasses.replace(common, per_method=common.per_method | best)
    run_folder.save_json(dataclasses.asdict(tuned), folder / f"{name}-tuned.json")
    print(f"Trials and the best are in {folder}: trials.csv, runs.csv, trials.png, {name}-tuned.json.")
    return folder


def _in_turn(searches: Mapping[str, Sequence[Sequence[Job]]]) -> list[Job]:
    """All jobs, trial by trial over all arms, so that an interruption leaves searches of one size."""
    return [job for trial in zip(*searches.values(), strict=True) for group in trial for job in group]


def _first_points(spaces: Mapping[str, Space], config: Tune) -> dict[str, list[Point]]:
    if config.share_points:
        return shared_sample(spaces, config.trials, config.sobol_seed)
    return {arm: sample(space, config.trials, config.sobol_seed) for arm, space in spaces.items()}


def _second_points(space: Space, points: Sequence[Point], accuracies: Sequence[float], config: Tune) -> list[Point]:
    """Equally many around each of the best four; around fewer, if there were fewer trials."""
    order = np.argsort(-np.asarray(accuracies), kind="stable")[:BEST]
    counts = [len(part) for part in np.array_split(np.arange(config.second_round), len(order))]
    seeds = [np.random.default_rng((config.sobol_seed, place)) for place in range(len(order))]
    found = [
        sample(neighbourhood(space, points[trial]), count, seed)
        for trial, count, seed in zip(order, counts, seeds, strict=True)
    ]
    return [point for around in found for point in around]


def _accuracy(seeds: Sequence[Job]) -> float:
    return float(np.mean([jobs.read_result(job).test_accuracy for job in seeds]))


def _row(arm: str, trial: int, number: int, seeds: Sequence[Job], names: Iterable[str]) -> dict[str, Any]:
    """A row of trials.csv."""
    found, settings = [jobs.read_result(job) for job in seeds], flat(seeds[0].recipe)
    accuracy, deviation = mean_and_deviation([result.test_accuracy for result in found])
    loss, _ = mean_and_deviation([result.test_loss for result in found])
    return {
        "arm": arm,
        "trial": trial,
        "round": number,
        "accuracy": accuracy,
        "accuracy_std": deviation,
        "loss": loss,
        "seeds": len(found),
        "failed": sum(bool(result.error) for result in found),
    } | {key: settings[key] for key in names}


def _difference(one: Recipe, common: Recipe) -> dict[str, Any]:
    """The settings in which an arm's recipe differs from the recipe of all arms."""
    besides, ignored = flat(common), {"method", "seed", "epochs", "evaluate_on", "per_method"}
    return {key: value for key, value in flat(one).items() if key not in ignored and value != besides.get(key)}
