"""Methods × seeds of one recipe: a folder a run, then a table (Markdown, CSV) and a plot over all of them."""

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import plots
from experiments.configs import Run
from experiments.logs import EpochRow, read_epochs
from experiments.optimizers import method_of
from experiments.recipes import Recipe
from experiments.train import train


class Summary(NamedTuple):
    """One row of summary.csv: a method at its last epoch, mean and sample standard deviation over its seeds."""

    method: str
    seeds: int
    test_accuracy: float
    test_accuracy_std: float
    test_loss: float
    test_loss_std: float
    train_loss: float
    train_loss_std: float
    images_per_second: float
    """Median over all epochs of all seeds."""


def compare(name: str, recipe: Recipe, methods: Sequence[str], seeds: int, run: Run) -> Path:
    """Trains every method with the seeds 0, 1, ..., and returns the folder with all runs, table and plot.

    Runs that are complete already are read, others go on where they were.
    """
    methods = tuple(dict.fromkeys(methods))
    for method in methods:
        method_of(dataclasses.replace(recipe, method=method))  # a misspelt name fails before the first run
    folder = run.out or Path("results") / name / f"compare-{recipe.augmentation}"
    rows: dict[str, list[list[EpochRow]]] = {method: [] for method in methods}
    for seed in range(seeds):
        for method in methods:
            one = dataclasses.replace(recipe, method=method, seed=seed)
            out = train(name, one, dataclasses.replace(run, out=folder / f"{method}-seed{seed}"))
            rows[method].append(read_epochs(out / "metrics.csv"))
    write_summary(folder, recipe, rows)
    return folder


def write_summary(folder: Path, recipe: Recipe, rows: dict[str, list[list[EpochRow]]]) -> None:
    """Writes summary.csv, table.md and curves.png, and prints the table.

    Args:
      folder: where to.
      recipe: of all runs, but for method and seed.
      rows: of each method, the epochs of each seed.
    """
    labels = {method: method_of(dataclasses.replace(recipe, method=method)).label for method in rows}
    summaries = [_summary(labels[method], seeds) for method, seeds in rows.items()]
    with (folder / "summary.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Summary._fields, *summaries])
    table = _table(summaries)
    (folder / "table.md").write_text(table)
    records = [_Record(method, **row._asdict()) for method, seeds in rows.items() for epochs in seeds for row in epochs]
    plots.curves(records, labels, folder / "curves.png", plots.TRAINING_PANELS)
    print(f"{table}\n{folder}: summary.csv, table.md, curves.png")


class _Record:
    """An epoch of a method, as the plot takes it."""

    def __init__(self, method: str, **fields: Any):
        self.method = method
        self.__dict__.update(fields)


def _summary(label: str, seeds: list[list[EpochRow]]) -> Summary:
    last = [epochs[-1] for epochs in seeds]
    speed = statistics.median(row.images_per_second for epochs in seeds for row in epochs)
    return Summary(
        label,
        len(seeds),
        *_mean_std([row.test_accuracy for row in last]),
        *_mean_std([row.test_loss for row in last]),
        *_mean_std([row.train_loss for row in last]),
        speed,
    )


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _table(summaries: Sequence[Summary]) -> str:
    titles = ("method", "test accuracy %", "test loss", "training loss", "images/s", "seeds")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for s in summaries:
        cells = (
            s.method,
            f"{s.test_accuracy:.2f} ± {s.test_accuracy_std:.2f}",
            f"{s.test_loss:.3f} ± {s.test_loss_std:.3f}",
            f"{s.train_loss:.3f} ± {s.train_loss_std:.3f}",
            f"{s.images_per_second:.0f}",
            str(s.seeds),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
