"""The study: which method helps, at what cost, and are flat minima more accurate? Its protocol is docs/study.md.

Methods are tuned equally and compared with many seeds; then come rank correlations over the runs and over the methods.
"""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.figures import plots
from experiments.settings import recipes
from experiments.settings.configs import Compare, Run, Tune
from experiments.settings.overrides import find
from experiments.settings.recipes import CrSam, Recipe
from experiments.settings.suggestions import unknown
from experiments.studies.compare import compare
from experiments.studies.jobs import Result
from experiments.studies.tune import tune
from experiments.system import files, tables

MAIN = ("base", "base,ema=0.99", "sam", "asam", "crsam", "sam-late", "crsam-late", "msam", "s2sam")
"""Each is tuned on its own, with the same number of trials."""

SECONDARY = (
    "base-2x",
    "base-3x",
    "sam-1.5x",
    "gsam",
    "wsam",
    "look-sam",
    "ae-sam",
    "crsam-linear",
    "crsam-eq7",
    "crsam,crsam.alpha=0,crsam.beta=0",
    "crsam,crsam.beta=0",
    "crsam,crsam.alpha=0",
    "crsam-random",
    "crsam-look",
    "crsam-ae",
)
"""They take what was found for base, SAM or CR-SAM."""

AGAINST = ("sam", "base", "crsam,crsam.alpha=0,crsam.beta=0")
"""To the last, SAM at CR-SAM's own settings, a difference is what the penalty does."""


MEASURES = {"normalized_trace": "C(w)", "trace": "trace", "curvature": "vᵀHv", "grad_norm": "‖∇L‖"}


class Task(NamedTuple):
    """What is learned."""

    recipe: Recipe
    """Of all arms, before tuning."""
    trial_seeds: int = 2
    """Runs of each setting in the search."""
    seeds: int = 10
    """Runs of each arm in the comparison, with other seeds."""


def _small(name: str, **changes: Any) -> Task:
    """A recipe with a tenth of its training data held out."""
    held_out = {"validation_fraction": 0.1, "test_examples_per_class": 500}
    return Task(dataclasses.replace(recipes.get(name), **(held_out | changes)))


# A ResNet-8 of width 8. CR-SAM's order is that in which the committed results were made: another rounds otherwise.
_resnet8 = partial(_small, "cifar10-resnet8", batch_size=32, crsam=CrSam(strategy="sequential"))

TASKS: dict[str, Task] = {
    "digits": Task(dataclasses.replace(recipes.get("digits"), per_method={}), trial_seeds=3, seeds=100),
    "cifar10": _resnet8(epochs=12),
    "cifar10-augmented": _resnet8(epochs=40, augmentation="basic"),
    "fashion-noise": _resnet8(dataset="fashion_mnist", epochs=16, examples_per_class=100, label_noise=0.4),
    "fashion-vit": _small(
        "fashion-small-vit",
        examples_per_class=100,
        model_options={"width": 48, "depth": 3, "num_heads": 3, "patch_size": 7},
    ),
}
"""By name; they take from twenty minutes to three hours on one core."""


def study(name: str, processes: int = 1, out: Path | None = None, trials: int = 16, seeds: int | None = None) -> Path:
    """Tune the main methods of a task of docs/study.md and compare all methods with fresh seeds, or resume it.

    Args:
      name: The task.
      processes: Run so many trainings at once, one core each.
      out: Folder of the results; results/study/NAME by default.
      trials: Settings tried for each main method.
      seeds: Runs of each arm in the comparison; the task's own number by default.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task, folder = TASKS[name], out or Path("results/study") / name
    search = Tune(MAIN, trials, task.trial_seeds, processes=processes)
    found = tune(name, task.recipe, search, {}, Run(folder / "tune", keep=None, log_steps=0))
    tuned = find(str(found / f"{name}-tuned.json"))
    longest = 3 * tuned.epochs  # base-3x
    last = Run(folder / "compare", keep=None, log_steps=0, evaluate_every=longest, probe_examples=500, trace_probes=10)
    arms = Compare(MAIN + SECONDARY, seeds or task.seeds, against=AGAINST, processes=processes)
    return mechanism(compare(name, tuned, arms, {}, last))


def mechanism(folder: Path) -> Path:
    """Reads runs.csv and summary.csv of a comparison; writes its correlations, mechanism.png and cost.png there.

    Four correlations of accuracy with each measure (Spearman's): of the methods' means; the same without those that
    were not tuned, of which some may have failed; of the runs of one method, the mean over methods; and of both losses'
    difference, the gap, instead of accuracy, of the methods' means.
    """
    runs = [row for row in tables.read(folder / "runs.csv", Result) if row.normalized_trace is not None]
    groups = {arm: [row for row in runs if row.arm == arm] for arm in dict.fromkeys(row.arm for row in runs)}
    if len(groups) < 3:
        raise ValueError(f"{folder} holds no comparison of three methods whose Hessian's trace was measured.")
    rows = [{"measure": label} | _correlations(field, groups) for field, label in MEASURES.items()]
    tables.write(folder / "correlations.csv", rows)
    titles = ("measure", "accuracy, over methods", "over tuned ones", "within a method", "gap, over methods")
    cells = [(label, *(f"{value:+.2f}" for value in values)) for label, *values in map(dict.values, rows)]
    text = tables.markdown(titles, cells)
    files.replace(folder / "correlations.md", text)
    with (folder / "summary.csv").open() as file:
        summaries = list(csv.DictReader(file))
    labels = {row["arm"]: row["label"] for row in summaries}
    plots.accuracy_over_flatness(groups, labels, folder / "mechanism.png", MAIN)
    plots.accuracy_over_cost([_numbers(row) for row in summaries], folder / "cost.png", MAIN)
    tables.show(text)
    return folder


def _numbers(row: Mapping[str, str]) -> dict[str, Any]:
    """A row of summary.csv with its numbers as numbers."""
    texts = ("arm", "label")
    return {key: value if key in texts else float(value) if value else None for key, value in row.items()}


def _correlations(field: str, groups: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    # Of each method an array [runs, 3].
    numbers = [
        np.array([(getattr(row, field), row.test_accuracy, row.test_loss - row.train_loss) for row in rows])
        for rows in groups.values()
    ]
    measure, accuracy, gap = np.array([[np.mean(column) for column in runs.T] for runs in numbers]).T
    is_tuned = [arm in MAIN for arm in groups]
    within = [_rank(runs[:, 0], runs[:, 1]) for runs in numbers if len(runs) > 2]
    return {
        "over_methods": _rank(measure, accuracy),
        "over_tuned": _rank(measure[is_tuned], accuracy[is_tuned]),
        "within_methods": float(np.nanmean(within)) if within else float("nan"),
        "gap_over_methods": _rank(measure, gap),
    }


def _rank(x: np.ndarray, y: np.ndarray) -> float:
    return float(stats.spearmanr(x, y).statistic)
