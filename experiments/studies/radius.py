"""Penalty or radius? CR-SAM against SAM on shared points, with several independent searches; see docs/regimes.md.

A difference between tuned methods includes the luck of two searches. Here each search is repeated with other points and
other seeds, and the interval is taken over the searches.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from scipy import stats

from experiments.settings import recipes
from experiments.settings.configs import Compare, Run, Tune
from experiments.settings.overrides import find
from experiments.settings.recipes import CrSam, Recipe
from experiments.settings.suggestions import check_names
from experiments.studies import study
from experiments.studies.compare import compare
from experiments.studies.jobs import Result
from experiments.studies.summary import accuracies, paired, with_interval
from experiments.studies.tune import tune
from experiments.system import files, tables

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")]

METHODS = ("sam", "crsam", "crsam-linear")
"""All, of which a run may leave out the last."""

NO_PENALTY = "crsam,crsam.alpha=0,crsam.beta=0"
"""SAM at CR-SAM's learning rate and radius."""

CONTRASTS = (("crsam", "sam"), ("crsam-linear", "sam"), ("crsam", NO_PENALTY))
"""The first is the primary one."""

SPACE = ("sam.rho=0.02:2", "crsam.rho=0.02:2")

FIRST_SEED = 1000
"""Comparisons begin here: seeds that neither searches nor the study have used."""

TASKS: dict[str, tuple[Recipe, int]] = {
    name: (dataclasses.replace(recipe, sam=recipes.Sam(), crsam=CrSam(strategy=recipe.crsam.strategy)), seeds)
    for name, recipe, seeds in (
        ("digits", study.TASKS["digits"].recipe, 3),
        ("fashion-noise", study.TASKS["fashion-noise"].recipe, 2),
        ("cifar10-5000", recipes.get("cifar10-5000"), 2),
    )
}
"""Recipe, with the default α and β, and runs of each trial."""


class Contrast(NamedTuple):
    """A row of contrasts.csv: the difference of two arms' accuracies, in points."""

    task: str
    arm: str
    against: str
    searches: int
    seeds: int
    """Of all searches together."""
    mean: float
    low: float
    """The interval of 95 % is Student's over the searches, each of which is one number: its mean over its seeds."""
    high: float
    p: float


def radius(
    names: Names,
    processes: int = 1,
    out: Path = Path("results/radius"),
    searches: int = 5,
    trials: int = 32,
    second_round: int = 32,
    seeds: int = 20,
    methods: tuple[str, ...] = METHODS,
) -> None:
    """Compare SAM and CR-SAM, tuned on the same points, over several independent searches; or resume it.

    Args:
        names: The tasks.
        processes: Run so many trainings at once, one core each.
        out: Folder of the results.
        searches: Independent searches of each task.
        trials: Points of learning rate and radius in the first round, the same for all methods.
        second_round: Further trials of each method around its best four, with α and β.
        seeds: Fresh runs of each method after each search.
        methods: What is tuned and compared; sam and crsam at least.
    """
    if not {"sam", "crsam"} <= set(methods):
        raise ValueError(f"--methods must hold sam and crsam, got {' '.join(methods)}.")
    check_names("task", names, TASKS)
    found: list[Contrast] = []
    for name in names:
        for search in range(searches):
            _search(name, search, out / name / f"search{search}", processes, trials, second_round, seeds, methods)
            # Over whole searches, so that an interruption leaves a table.
            write_contrasts(found + contrasts(name, out / name, search + 1), out)
        found += contrasts(name, out / name, searches)
    tables.show((out / "contrasts.md").read_text())


def _search(
    name: str,
    search: int,
    folder: Path,
    processes: int,
    trials: int,
    second_round: int,
    seeds: int,
    methods: tuple[str, ...],
) -> None:
    recipe, trial_seeds = TASKS[name]
    config = Tune(
        methods,
        trials,
        trial_seeds,
        SPACE,
        sobol_seed=search,
        share_points=True,
        second_round=second_round,
        processes=processes,
    )
    found = tune(name, recipe, config, {}, Run(folder / "tune", keep=None, log_steps=0))
    first = FIRST_SEED + search * seeds
    arms = Compare((*methods, NO_PENALTY), seeds, first, against=("sam", NO_PENALTY), processes=processes)
    last = Run(folder / "compare", keep=None, log_steps=0, evaluate_every=recipe.epochs, probe_examples=0)
    compare(name, find(str(found / f"{name}-tuned.json")), arms, {}, last)


def contrasts(name: str, folder: Path, searches: int) -> list[Contrast]:
    """The contrasts of a task over the searches in its folder, of the arms that are there."""
    found = [tables.read(folder / f"search{i}" / "compare" / "runs.csv", Result) for i in range(searches)]
    compared = {row.arm for row in found[0]}
    return [contrast(name, *arms, found) for arms in CONTRASTS if compared.issuperset(arms)]


def contrast(task: str, arm: str, against: str, found: Sequence[Sequence[Result]]) -> Contrast:
    """The difference of two arms over searches, paired by seed within each.

    Example:
      >>> runs = [[Result(arm, seed, "", 1, seed + gain) for arm, gain in (("sam", 0), ("crsam", 1 + seed % 3))]
      ...         for seed in range(3)]
      >>> contrast("digits", "crsam", "sam", runs)[3:6]
      (3, 3, 2.0)
    """
    within = [paired(accuracies(rows, arm), accuracies(rows, against)) for rows in found]
    searches = len(within)
    over = paired({i: one.mean for i, one in enumerate(within)}, dict.fromkeys(range(searches), 0.0))
    error = over.deviation / math.sqrt(searches)  # NaN for a single search
    p = float(2 * stats.t.sf(abs(over.mean) / error, searches - 1)) if error > 0 else math.nan
    pairs = sum(one.pairs for one in within)
    return Contrast(task, arm, against, searches, pairs, over.mean, over.low, over.high, p)


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in their order; one that is not known yet, NaN, counts as 1.

    Example:
      >>> holm([0.04, 0.01, 0.03])
      [0.06, 0.03, 0.06]
      >>> holm([math.nan, 0.01])
      [1.0, 0.02]
    """
    values = [1.0 if math.isnan(value) else value for value in values]
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, highest = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = highest
    return adjusted


def write_contrasts(rows: Sequence[Contrast], folder: Path) -> None:
    """Writes contrasts.csv and contrasts.md; p of the primary contrast is Holm's over the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    primary = [row for row in rows if (row.arm, row.against) == CONTRASTS[0]]
    adjusted = dict(zip([row.task for row in primary], holm([row.p for row in primary]), strict=True))
    lines: list[list[Any]] = []
    for row in rows:
        interval = with_interval(row.mean, row.low, row.high)
        p = f"{adjusted[row.task]:.3f}" if row in primary and not math.isnan(row.p) else "–"
        lines.append([row.task, row.arm, row.against, f"{row.searches}", f"{row.seeds}", interval, p])
    tables.write(folder / "contrasts.csv", rows)
    titles = ("task", "arm", "against", "searches", "seeds", "difference, points (95 % over searches)", "p, Holm")
    files.replace(folder / "contrasts.md", tables.markdown(titles, lines))
