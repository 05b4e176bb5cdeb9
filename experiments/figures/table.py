"""Table 3: gradient norm, trace, normalized trace and accuracy after the last epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.figures.measures import Curvature
from experiments.figures.trained import Trained
from experiments.tables import mean_and_deviation

_FIELDS = ("gradient_norm", "trace", "normalized_trace", "top_eigenvalue")
_TITLES = {
    "test": "Test set, as in the paper; accuracy on all test images of the runs, the rest on {} of them",
    "train": "Training set, {} images",
}


class Cell(NamedTuple):
    """A mean over runs, and their sample standard deviation, NaN for a single run."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        text = f"{self.mean:.2f}"
        return text if self.deviation != self.deviation else f"{text} ± {self.deviation:.2f}"


def cells(curvature: Sequence[Curvature], trained: Sequence[Trained], method: str, split: str) -> list[Cell]:
    """The measures on a split after the last epoch, and the accuracy on the same split's data.

    Args:
      curvature: rows of all runs.
      trained: the runs; the test accuracy is that of the last epoch on all of the evaluation data.
      method: whose row.
      split: train or test.

    Returns:
      Gradient norm, trace, normalized trace, largest eigenvalue, accuracy.
    """
    own = [row for row in curvature if row.method == method and row.split == split]
    last = [row for row in own if row.epoch == max(r.epoch for r in own)]
    accuracies = [row.accuracy for row in last]
    if split == "test":
        accuracies = [run.metrics[-1].test_accuracy for run in trained if run.recipe.method == method]
    values = [[getattr(row, field) for row in last] for field in _FIELDS]
    return [Cell(*mean_and_deviation(numbers)) for numbers in (*values, accuracies)]


def table_3(curvature: Sequence[Curvature], trained: Sequence[Trained], labels: Mapping[str, str], out: Path) -> str:
    """Writes table3.md: mean ± sample standard deviation over seeds, on both sets.

    Args:
      curvature: rows of all runs.
      trained: the runs.
      labels: of the methods, in the order of the rows.
      out: folder of the table.

    Returns:
      The table as Markdown.
    """
    parts = []
    for split, title in _TITLES.items():
        rows = [row for row in curvature if row.split == split]
        seeds, epoch = len({row.seed for row in rows}), max(row.epoch for row in rows)
        lines = [
            f"{title.format(rows[0].examples)}, after epoch {epoch}: {_spread(seeds)}.",
            "",
            "| method | ‖∇L‖ | Tr ∇²L | C(w) | λ₁ | accuracy, % |",
            "|---|---|---|---|---|---|",
        ]
        for method, label in labels.items():
            lines.append(f"| {label} | " + " | ".join(map(str, cells(curvature, trained, method, split))) + " |")
        parts.append("\n".join(lines) + "\n")
    text = "\n".join(parts)
    (out / "table3.md").write_text(text)
    return text


def _spread(seeds: int) -> str:
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
