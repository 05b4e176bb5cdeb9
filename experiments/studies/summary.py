"""What a comparison found: means and spreads, differences seed by seed, and how many seeds are needed to see one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.figures import plots
from experiments.studies import jobs
from experiments.studies.jobs import Job, Result
from experiments.system import files, tables
from experiments.system.tables import mean_and_deviation
from experiments.training.logs import EpochRow

LEVEL, POWER, MOST_SEEDS = 0.95, 0.8, 10_000

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


class Difference(NamedTuple):
    """Of an arm to the reference: the mean over the seeds that both have, and an interval.

    The interval is Student's for paired observations, at the level 1 − 0.05/m for m differences, so that all
    intervals of a comparison are simultaneous 95 % intervals (Bonferroni). NaN for less than two seeds.
    """

    mean: float
    low: float
    high: float
    deviation: float
    """Sample standard deviation of the single differences."""
    pairs: int


def write_summary(
    folder: Path, labels: Mapping[str, str], complete: Sequence[Job], against: Sequence[str], detect: float
) -> None:
    """Writes the results of complete runs as tables and plots, and prints the main table.

    Differences are taken to each of the arms ``against``; summary.csv has those to the first.
    """
    results: dict[str, list[Result]] = {}
    epochs: dict[str, list[list[EpochRow]]] = {}
    for job in complete:
        results.setdefault(job.arm, []).append(jobs.read_result(job))
        if rows := job.rows:
            epochs.setdefault(labels[job.arm], []).append(rows)
    found = [(reference, summarize(results, labels, reference, detect)) for reference in against]
    (_, summaries), *_ = found
    tables.write(folder / "runs.csv", [row for rows in results.values() for row in rows])
    tables.write(folder / "summary.csv", summaries)
    table = tables.markdown(*_main_table(results, summaries))
    differences = [_difference_table(rows, reference, labels[reference], detect) for reference, rows in found]
    files.replace(folder / "table.md", table + "".join(differences))
    plots.curves(epochs, folder / "curves.png")
    plots.accuracy_over_time(epochs, folder / "time.png")
    plots.accuracy_over_cost(summaries, folder / "cost.png")
    tables.show(table)
    print(f"Runs, tables and plots are in {folder}: runs.csv, summary.csv, table.md, curves.png, time.png, cost.png.")


def summarize(results: Results, labels: Mapping[str, str], against: str, detect: float) -> list[dict[str, Any]]:
    """One row per arm.

    It has mean and sample standard deviation (``_std``) of each number in :class:`Result`; the quartiles of
    ``seconds``, which other work disturbs; ``failed``, how many losses were not finite (scored at chance level);
    ``relative_time`` of a step, the medians' ratio to the reference; the ``difference`` of the accuracies to the
    reference's, in points, seed by seed, with an interval (simultaneous 95 % intervals in a table); and
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
        summary |= zip(("difference", "low", "high", "difference_std", "pairs"), difference, strict=True)
        summary["seeds_needed"] = seeds_needed(difference.deviation, detect, comparisons)
        summaries.append(summary)
    return summaries


def paired(values: Mapping[int, float], reference: Mapping[int, float], comparisons: int = 1) -> Difference:
    """The difference of values to a reference, both by seed; one of m comparisons that are looked at together.

    Example:
      >>> difference = paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
      >>> difference.mean, difference.deviation, difference.pairs
      (2.0, 1.0, 3)
      >>> print(round(difference.high, 3))  # 2 + 4.303 / √3
      4.484
    """
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not (pairs := len(differences)):
        return Difference(math.nan, math.nan, math.nan, math.nan, 0)
    mean, deviation = mean_and_deviation(differences)
    half = float(_critical(comparisons, pairs)) * deviation / math.sqrt(pairs)  # NaN for a single pair
    return Difference(mean, mean - half, mean + half, deviation, pairs)


def accuracies(rows: Iterable[Result], arm: str) -> dict[int, float]:
    """The test accuracies of an arm, in percent, by seed."""
    return {row.seed: row.test_accuracy for row in rows if row.arm == arm}


def with_interval(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A difference and its interval, if there is one.

    Example:
      >>> with_interval(1.5, -0.25, 3.25)
      '+1.50 (−0.25 to +3.25)'
      >>> with_interval(1.5, math.nan, math.nan)
      '+1.50 (a single value, no interval)'
    """
    interval = "a single value, no interval" if math.isnan(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
    return f"{mean:+.{digits}f} ({interval})".replace("-", "−")


def seeds_needed(deviation: float, difference: float, comparisons: int = 1) -> int | None:
    """How many seeds a paired t test at the level 0.05/m needs, to find a true difference with a probability of 80 %.

    The deviation is measured on the single differences of a pilot. None if it is unknown, or for more than 10,000.

    Example:
      >>> seeds_needed(deviation=1.0, difference=1.0)
      10
    """
    if not math.isfinite(deviation):
        return None
    seeds = np.arange(2, MOST_SEEDS + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = abs(difference) / np.float64(deviation) * np.sqrt(seeds)
    power = stats.nct.sf(_critical(comparisons, seeds), seeds - 1, shift)  # the other tail is the wrong direction
    enough = np.flatnonzero(~(power < POWER))  # NaN means a shift so large that the power is 1
    return int(seeds[enough[0]]) if len(enough) else None


def _critical(comparisons: int, seeds: Any) -> Any:
    return stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, seeds - 1)


def _main_table(results: Results, summaries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Each arm's last epoch, mean ± sample standard deviation; columns that nothing was measured for are left out."""
    columns = [column for column in _COLUMNS if any(summary[column[1]] is not None for summary in summaries)]
    lines = []
    for summary in summaries:
        cells = [_spread(_known(results[summary["arm"]], field), digits) for _, field, digits in columns]
        cells += [_text(summary["evaluations_per_step"], ".2g"), _text(summary["relative_time"], ".2f")]
        failed = f", {summary['failed']} failed" if summary["failed"] else ""
        lines.append([summary["label"], *cells, f"{summary['seeds']}{failed}"])
    return ["method", *(title for title, _, _ in columns), "evals", "time", "seeds"], lines


def _difference_table(summaries: Sequence[Mapping[str, Any]], against: str, label: str, detect: float) -> str:
    """The differences to the reference, if there are any."""
    titles = "accuracy, points", "95 % interval", "calibration error", f"seeds for {detect:g} points"
    lines = []
    for s in summaries:
        if s["arm"] != against and s["pairs"]:
            interval = f"{s['low']:+.2f} to {s['high']:+.2f}" if s["pairs"] > 1 else "–"
            others = _text(s["calibration_error"], ".3f"), _text(s["seeds_needed"], "d")
            lines.append([s["label"], f"{s['difference']:+.2f}", interval, *others])
    return "\n" + tables.markdown((f"against {label}", *titles), lines) if lines else ""


def _known(rows: Sequence[Result], field: str) -> list[float]:
    return [value for value in (getattr(row, field) for row in rows) if value is not None]


def _quartiles(rows: Sequence[Result], field: str) -> list[float] | list[None]:
    values = _known(rows, field)
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist() if values else [None] * 3


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")
