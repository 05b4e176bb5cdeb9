"""Does a flat minimum go with accuracy? Rank correlations over the runs and over the methods of a comparison."""

import csv
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments import plots, tables
from experiments.jobs import Result
from experiments.tables import markdown

MEASURES = {"normalized_trace": "C(w)", "trace": "trace", "curvature": "vᵀHv", "grad_norm": "‖∇L‖"}


def mechanism(folder: Path, tuned: Collection[str]) -> Path:
    """Reads runs.csv and summary.csv of a comparison; writes correlations.csv, correlations.md and mechanism.png there.

    Four correlations of accuracy with each measure (Spearman's): of the methods' means; the same without those that
    were not tuned, of which some may have failed; of the runs of one method, the mean over methods; and of both losses'
    difference, the gap, instead of accuracy, of the methods' means.

    Args:
      folder: of the comparison.
      tuned: the arms that were tuned.

    Raises:
      ValueError: if the folder holds no comparison in which these were measured.
    """
    runs = [row for row in tables.read(folder / "runs.csv", Result) if row.normalized_trace is not None]
    arms = list(dict.fromkeys(row.arm for row in runs))
    if len(arms) < 3:
        raise ValueError(f"{folder} holds no comparison of three methods whose Hessian's trace was measured.")
    groups = [[row for row in runs if row.arm == arm] for arm in arms]
    rows = [_correlations(field, label, groups, tuned) for field, label in MEASURES.items()]
    tables.write(folder / "correlations.csv", rows)
    titles = ("measure", "accuracy, over methods", "over tuned ones", "within a method", "gap, over methods")
    text = markdown(titles, [(row["measure"], *(f"{row[key]:+.2f}" for key in list(row)[1:])) for row in rows])
    tables.replace(folder / "correlations.md", text)
    plots.accuracy_over_flatness(
        dict(zip(map(_labels(folder).__getitem__, arms), groups, strict=True)), folder / "mechanism.png"
    )
    tables.show(text)
    return folder


def _labels(folder: Path) -> dict[str, str]:
    """What each arm is called in tables."""
    with (folder / "summary.csv").open() as file:
        return {row["arm"]: row["label"] for row in csv.DictReader(file)}


def _correlations(field: str, label: str, groups: Sequence[Sequence[Result]], tuned: Collection[str]) -> dict[str, Any]:
    def over(groups: Sequence[Sequence[Result]], judged: Callable[[Result], float] = _accuracy) -> float:
        measured = [np.mean([getattr(row, field) for row in rows]) for rows in groups]
        return _rank(measured, [np.mean([judged(row) for row in rows]) for rows in groups])

    within = [
        _rank([getattr(row, field) for row in rows], list(map(_accuracy, rows))) for rows in groups if len(rows) > 2
    ]
    return {
        "measure": label, "over_methods": over(groups), "over_tuned": over([g for g in groups if g[0].arm in tuned]),
        "within_methods": float(np.nanmean(within)) if within else float("nan"),
        "gap_over_methods": over(groups, lambda row: row.test_loss - row.train_loss),
    }  # fmt: skip


def _accuracy(row: Result) -> float:
    return row.test_accuracy


def _rank(x: Sequence[Any], y: Sequence[Any]) -> float:
    return float(stats.spearmanr(x, y).statistic)
