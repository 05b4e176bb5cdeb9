"""Methods × seeds under the same settings: metrics on disk as they come, then a table and a plot."""

import dataclasses
import difflib
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from experiments import configs, plots, runs
from experiments.methods import METHODS
from experiments.training import EpochRecord, epochs_of, make_program, make_task, train

# Column title, field of EpochRecord, decimals.
_COLUMNS = (
    ("accuracy %", "test_accuracy", 1),
    ("test loss", "test_loss", 2),
    ("‖∇L‖", "grad_norm", 2),
    ("vᵀHv", "curvature", 1),
)


def compare(config: configs.Digits, out: Path | None = None) -> Path:
    """Trains every method with every seed, and returns the folder with metrics.csv, table.md and curves.png.

    Ctrl-C ends the runs; what was measured until then is in metrics.csv, and the table and the plot are made of
    the runs that were completed.

    Args:
      config: the settings.
      out: the folder for the results; ``None`` is a new one under results/.
    """
    config = dataclasses.replace(config, methods=_resolved(config.methods))
    console = Console()
    folder = runs.new_folder("digits", out)
    runs.save_config(config, folder)
    console.print(f"Writing to {folder}")
    records: list[EpochRecord] = []
    try:
        _train_all(config, folder, console, records)
    except KeyboardInterrupt:
        console.print(f"[yellow]Interrupted: metrics so far are in {folder / 'metrics.csv'}.")
    complete = _complete(config, records)
    if complete:
        labels = {name: METHODS[name].label for name in config.methods}
        table = summary(config, complete)
        (folder / "table.md").write_text(table)
        plots.curves(complete, labels, folder / "curves.png")
        console.print(_rich_table(table))
        console.print(f"Metrics, table and curves: {folder}/metrics.csv, table.md, curves.png")
    return folder


def summary(config: configs.Digits, records: Sequence[EpochRecord]) -> str:
    """The table as Markdown: each method's last epoch, mean ± sample standard deviation over its seeds.

    Accuracy and loss are those on the test split, ‖∇L‖ and vᵀHv those on the training set. Evaluations of the gradient
    ("evals") are per step; so is time, each method's median over all its epochs but the first of a run, over SGD's.
    """
    titles = ["method", *(title for title, _, _ in _COLUMNS), "evals", "time", "seeds"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for method in config.methods:
        last = [r for r in records if r.method == method and r.epoch == epochs_of(config, method)]
        if last:
            cells = [_mean_std([getattr(r, field) for r in last], digits) for _, field, digits in _COLUMNS]
            evaluations = f"{statistics.fmean(r.evaluations_per_step for r in last):.2g}"
            time = _relative_time(method, records)
            cells = [METHODS[method].label, *cells, evaluations, time, str(len(last))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _resolved(names: Sequence[str]) -> tuple[str, ...]:
    """The names of the methods, each checked; "all" stands for every one.

    Raises:
      ValueError: for an unknown name, with the close ones and the list.
    """
    if tuple(names) == ("all",):
        return tuple(METHODS)
    for name in names:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"unknown method {name!r}.{hint} The methods are {', '.join(METHODS)}, or all.")
    return tuple(dict.fromkeys(names))


def _train_all(config: configs.Digits, folder: Path, console: Console, records: list[EpochRecord]) -> None:
    """Trains seed by seed, all methods in turn, so that an interruption leaves comparable runs."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    total = config.seeds * sum(epochs_of(config, method) for method in config.methods)
    programs = {method: make_program(config, method) for method in config.methods}
    writer = runs.CsvWriter(folder / "metrics.csv", EpochRecord)
    with writer, Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total)
        for seed in range(config.seeds):
            task = make_task(config, seed)
            for method in config.methods:
                for record in train(config, method, seed, task, programs[method]):
                    writer.write(record)
                    records.append(record)
                    text = f"{METHODS[method].label}, seed {seed}: test accuracy {record.test_accuracy:.1f} %"
                    progress.update(bar, advance=1, description=text)


def _complete(config: configs.Digits, records: Sequence[EpochRecord]) -> list[EpochRecord]:
    """The records of the runs that reached their last epoch."""
    done = {(r.method, r.seed) for r in records if r.epoch == epochs_of(config, r.method)}
    return [r for r in records if (r.method, r.seed) in done]


def _relative_time(method: str, records: Sequence[EpochRecord]) -> str:
    def median(name: str) -> float | None:
        times = [r.seconds_per_step for r in records if r.method == name and r.epoch > 1]
        return statistics.median(times) if times else None

    base, own = median("sgd"), median(method)
    return "–" if base is None or own is None else f"{own / base:.2f}"


def _mean_std(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _rich_table(markdown: str) -> Table:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    method, *others = rows[0]
    table = Table(  # without borders: the main job's fits into 80 columns
        Column(method, no_wrap=True), *(Column(title, justify="right") for title in others),
        box=None, collapse_padding=True, pad_edge=False, header_style="bold",
    )  # fmt: skip
    for row in rows[2:]:
        table.add_row(*row)
    return table
