"""Does a flat minimum go with accuracy? Rank correlations over the runs and over the methods of a comparison."""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments import plots, tables
from experiments.jobs import Result

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
    groups = {arm: [row for row in runs if row.arm == arm] for arm in dict.fromkeys(row.arm for row in runs)}
    if len(groups) < 3:
        raise ValueError(f"{folder} holds no comparison of three methods whose Hessian's trace was measured.")
    rows = [{"measure": label} | _correlations(field, groups, tuned) for field, label in MEASURES.items()]
    tables.write(folder / "correlations.csv", rows)
    titles = ("measure", "accuracy, over methods", "over tuned ones", "within a method", "gap, over methods")
    cells = [(label, *(f"{value:+.2f}" for value in values)) for label, *values in map(dict.values, rows)]
    text = tables.markdown(titles, cells)
    tables.replace(folder / "correlations.md", text)
    with (folder / "summary.csv").open() as file:
        labels = {row["arm"]: row["label"] for row in csv.DictReader(file)}
    plots.accuracy_over_flatness({labels[arm]: rows for arm, rows in groups.items()}, folder / "mechanism.png")
    tables.show(text)
    return folder


def _correlations(field: str, groups: Mapping[str, Sequence[Result]], tuned: Collection[str]) -> dict[str, Any]:
    numbers = [
        np.array([(getattr(row, field), row.test_accuracy, row.test_loss - row.train_loss) for row in rows])
        for rows in groups.values()
    ]
    measure, accuracy, gap = np.array([[np.mean(column) for column in runs.T] for runs in numbers]).T
    is_tuned = [arm in tuned for arm in groups]
    within = [_rank(runs[:, 0], runs[:, 1]) for runs in numbers if len(runs) > 2]
    return {
        "over_methods": _rank(measure, accuracy),
        "over_tuned": _rank(measure[is_tuned], accuracy[is_tuned]),
        "within_methods": float(np.nanmean(within)) if within else float("nan"),
        "gap_over_methods": _rank(measure, gap),
    }


def _rank(x: np.ndarray, y: np.ndarray) -> float:
    return float(stats.spearmanr(x, y).statistic)
