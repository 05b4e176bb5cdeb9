"""What a comparison found: means and spreads, paired differences, and how many seeds it takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import jobs, plots, tables
from experiments.intervals import paired, seeds_needed
from experiments.jobs import Job, Result
from experiments.logs import EpochRow
from experiments.tables import mean_and_deviation

# Title, field of Result, decimals.
_COLUMNS = (
    ("accuracy %", "test_accuracy", 1),
    ("test loss", "test_loss", 2),
    ("‖∇L‖", "grad_norm", 2),
    ("vᵀHv", "curvature", 1),
    ("trace", "trace", 1),
    ("C(w)", "normalized_trace", 1),
)

_FIELDS = Result._fields[Result._fields.index("test_accuracy") : Result._fields.index("error")]

Results = Mapping[str, Sequence[Result]]
"""Of each arm the results of its seeds."""


def write_summary(
    folder: Path, labels: Mapping[str, str], complete: Sequence[Job], against: Sequence[str], detect: float = 0.5
) -> None:
    """Writes runs.csv, summary.csv, table.md, curves.png, time.png and cost.png, and prints the table.

    Args:
      folder: where to.
      labels: of the arms.
      complete: the runs.
      against: the arms that differences are taken to; summary.csv has those to the first.
      detect: difference of accuracy for which the number of seeds is estimated.
    """
    results: dict[str, list[Result]] = {}
    epochs: dict[str, list[list[EpochRow]]] = {}
    for job in complete:
        results.setdefault(job.arm, []).append(jobs.read_result(job))
        if rows := job.rows:
            epochs.setdefault(labels[job.arm], []).append(rows)
    summaries, *others = (summarize(results, labels, reference, detect) for reference in against)
    tables.write(folder / "runs.csv", [row for rows in results.values() for row in rows])
    tables.write(folder / "summary.csv", summaries)
    table = tables.markdown(*_main_table(results, summaries))
    differences = [
        _difference_table(found, labels[reference], reference, detect)
        for found, reference in zip((summaries, *others), against, strict=True)
    ]
    tables.replace(folder / "table.md", table + "".join(differences))
    plots.curves(epochs, folder / "curves.png")
    plots.accuracy_over_time(epochs, folder / "time.png")
    plots.accuracy_over_cost(summaries, folder / "cost.png")
    tables.show(table)
    print(f"Runs, tables and plots are in {folder}: runs.csv, summary.csv, table.md, curves.png, time.png, cost.png.")


def summarize(results: Results, labels: Mapping[str, str], against: str, detect: float) -> list[dict[str, Any]]:
    """One row an arm.

    It has mean and sample standard deviation (``_std``) of each number in :class:`Result`; the quartiles of
    ``seconds``, which other work disturbs; ``failed``, how many losses were not finite (they count, as a guess);
    ``relative_time`` of a step, the medians' ratio to the reference; the ``difference`` of the accuracies to the
    reference's, in points, seed by seed, with an interval (all of a table's hold together with 95 %); and
    ``seeds_needed`` to find one of ``detect`` points with a probability of 80 %.
    """
    reference = {row.seed: row.test_accuracy for row in results.get(against, [])}
    _, base_time, _ = _quartiles(results.get(against, []), "seconds_per_step")
    comparisons, summaries = max(1, len(results) - 1), []
    for arm, rows in results.items():
        summary: dict[str, Any] = {"arm": arm, "label": labels[arm], "seeds": len(rows)}
        summary["failed"] = sum(bool(row.error) for row in rows)
        for field in _FIELDS:
            values = _known(rows, field)
            summary[field], summary[f"{field}_std"] = mean_and_deviation(values) if values else (None, None)
        summary |= zip(("seconds_low", "seconds_median", "seconds_high"), _quartiles(rows, "seconds"), strict=True)
        _, time, _ = _quartiles(rows, "seconds_per_step")
        summary["relative_time"] = time / base_time if time and base_time else None
        difference = paired({row.seed: row.test_accuracy for row in rows}, reference, comparisons)
        summary |= {"difference": difference.mean, "low": difference.low, "high": difference.high}
        summary |= {"difference_std": difference.deviation, "pairs": difference.pairs}
        summary["seeds_needed"] = seeds_needed(difference.deviation, detect, comparisons)
        summaries.append(summary)
    return summaries


def _main_table(results: Results, summaries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Each arm's last epoch, mean ± sample standard deviation; columns that nothing was measured for are left out."""
    columns = [column for column in _COLUMNS if any(summary[column[1]] is not None for summary in summaries)]
    lines = []
    for summary in summaries:
        cells = [_cell(_known(results[summary["arm"]], field), digits) for _, field, digits in columns]
        cells += [_text(summary["evaluations_per_step"], ".2g"), _text(summary["relative_time"], ".2f")]
        failed = f", {summary['failed']} failed" if summary["failed"] else ""
        lines.append([summary["label"], *cells, f"{summary['seeds']}{failed}"])
    return ["method", *(title for title, _, _ in columns), "evals", "time", "seeds"], lines


def _difference_table(summaries: Sequence[Mapping[str, Any]], label: str, against: str, detect: float) -> str:
    """The differences to the reference, if there are any."""
    titles = (
        f"against {label}", "accuracy, points", "95 % interval", "calibration error", f"seeds for {detect:g} points",
    )  # fmt: skip
    lines = [
        [
            s["label"], f"{s['difference']:+.2f}", f"{s['low']:+.2f} to {s['high']:+.2f}" if s["pairs"] > 1 else "–",
            _text(s["calibration_error"], ".3f"), _text(s["seeds_needed"], "d"),
        ]
        for s in summaries if s["arm"] != against and s["pairs"]
    ]  # fmt: skip
    return "\n" + tables.markdown(titles, lines) if lines else ""


def _known(rows: Sequence[Result], field: str) -> list[float]:
    return [value for value in (getattr(row, field) for row in rows) if value is not None]


def _quartiles(rows: Sequence[Result], field: str) -> list[float] | list[None]:
    values = _known(rows, field)
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist() if values else [None] * 3


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")
