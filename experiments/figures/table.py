"""Table 3: gradient norm, trace, normalized trace and accuracy after the last epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.figures.measures import Curvature
from experiments.figures.trained import Trained
from experiments.tables import markdown, mean_and_deviation

_COLUMNS = {"gradient_norm": "‖∇L‖", "trace": "Tr ∇²L", "normalized_trace": "C(w)", "top_eigenvalue": "λ₁"}
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
    """The columns of a method: the measures on a split after the last epoch, then the accuracy on the split.

    That on the test set is on all of the evaluation data, not on the images of the measures.
    """
    own = [row for row in curvature if row.method == method and row.split == split]
    last = [row for row in own if row.epoch == max(r.epoch for r in own)]
    accuracies = [row.accuracy for row in last]
    if split == "test":
        accuracies = [run.metrics[-1].test_accuracy for run in trained if run.recipe.method == method]
    values = [[getattr(row, field) for row in last] for field in _COLUMNS]
    return [Cell(*mean_and_deviation(numbers)) for numbers in (*values, accuracies)]


def table_3(curvature: Sequence[Curvature], trained: Sequence[Trained], labels: Mapping[str, str], out: Path) -> str:
    """Writes and returns table3.md: mean ± sample standard deviation over seeds, on both sets."""
    parts = []
    for split, title in _TITLES.items():
        rows = [row for row in curvature if row.split == split]
        seeds, epoch = len({row.seed for row in rows}), max(row.epoch for row in rows)
        spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        lines = [(label, *map(str, cells(curvature, trained, method, split))) for method, label in labels.items()]
        table = markdown(("method", *_COLUMNS.values(), "accuracy, %"), lines)
        parts.append(f"{title.format(rows[0].examples)}, after epoch {epoch}: {spread}.\n\n{table}")
    text = "\n".join(parts)
    (out / "table3.md").write_text(text)
    return text
