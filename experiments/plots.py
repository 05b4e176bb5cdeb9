"""Plots of comparisons and searches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import style
from experiments.logs import EpochRow

_LOOKS = [
    (color, line, marker)
    for line, marker in zip(("-", "--", ":", "-.") * 2, "os^vDPX*", strict=True)
    for color in style.COLORS
]

_PANELS = {
    "test_accuracy": "test accuracy, %",
    "test_loss": "test loss",
    "train_accuracy": "training accuracy, %",
    "curvature": "curvature vᵀHv\non the training set",
    "train_loss": "training loss",
}

Runs = Mapping[str, Sequence[Sequence[EpochRow]]]
"""From an arm's label to the epochs of each of its seeds."""


def curves(runs: Runs, path: Path) -> None:
    """Draws four measures over training: a line for the mean over seeds, a band for ± one standard deviation.

    The horizontal axis is the share of the arm's own epochs, since arms may train for different ones.
    """
    if not runs:  # none has a finite loss
        return
    rows = [row for seeds in runs.values() for row in seeds[0]]
    fields = [field for field in _PANELS if all(getattr(row, field) is not None for row in rows)][:4]
    with style.drawn(path, height=5, legend=("upper", min(len(runs), 4))) as figure:
        axes = figure.subplots(2, 2, sharex=True)
        for axis, field in zip(axes.flat, fields, strict=True):
            for (label, seeds), (color, line, _) in _with_looks(runs.items()):
                share = [100 * row.epoch / seeds[0][-1].epoch for row in seeds[0]]
                values = [[getattr(row, field) for row in epoch] for epoch in zip(*seeds, strict=True)]
                style.band(axis, share, values, label=label, color=color, linestyle=line)
            axis.set_ylabel(_PANELS[field])
            if field in ("curvature", "train_loss"):
                axis.set_yscale("log")
        for axis in axes[1]:
            axis.set_xlabel("share of the training run, %")


def accuracy_over_time(runs: Runs, path: Path) -> None:
    """Draws the mean test accuracy over the mean seconds of training, and each arm's end with its spread."""
    with style.drawn(path, height=3.6, legend=("upper", min(len(runs), 4))) as figure:
        axis = figure.subplots()
        for (label, seeds), (color, line, _) in _with_looks(runs.items()):
            seconds = np.cumsum([[row.seconds for row in rows] for rows in seeds], axis=1).mean(axis=0)
            accuracy = np.array([[row.test_accuracy for row in rows] for rows in seeds])
            axis.plot(seconds, accuracy.mean(axis=0), label=label, alpha=0.6, color=color, linestyle=line)
            spread = accuracy[:, -1].std(ddof=1) if len(seeds) > 1 else None
            axis.errorbar(seconds[-1], accuracy[:, -1].mean(), spread, fmt="o", capsize=2, color=color)
        axis.set(xlabel="seconds of training", ylabel=_PANELS["test_accuracy"], xscale="log")


def accuracy_over_cost(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the mean accuracy of each arm, with its standard error, over the quartiles of seconds of a run; the front.

    The front is what no other arm beats in both. An arm far below the first one stands at the lower edge as an arrow,
    with its accuracy in the legend: a failure would press all others into one line.
    """
    points = [s for s in summaries if s["seconds_median"] is not None]
    if not points:
        return
    first, highest = points[0]["test_accuracy"], max(s["test_accuracy"] for s in points)
    lowest = first - max(5.0, 2 * (highest - first))  # twice as far below the first as the best is above it, or 5 %
    with style.drawn(path, height=4.4, legend=("lower", 3)) as figure:
        axis = figure.subplots()
        for s, (color, _, marker) in _with_looks(points):
            seconds, error = s["seconds_median"], (s["test_accuracy_std"] or 0) / np.sqrt(s["seeds"])
            spread = [[seconds - s["seconds_low"]], [s["seconds_high"] - seconds]]
            height, label = s["test_accuracy"], s["label"]
            if height < lowest:
                height, marker, error, label = lowest, r"$\downarrow$", 0, f"{label}: {height:.1f} %"
            axis.errorbar(seconds, height, error, spread, marker=marker, ls="none", color=color, label=label)
        best = front([(s["seconds_median"], s["test_accuracy"]) for s in points])
        axis.step(*zip(*best, strict=True), where="post", color="#bbbbbb", zorder=0)
        axis.set(xlabel="seconds of training", ylabel=_PANELS["test_accuracy"], xscale="log")
        style.plain_log_ticks(axis.xaxis)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of (cost, gain) that none of no more cost equals or beats, by cost.

    Example:
      >>> front([(2.0, 5.0), (1.0, 3.0), (3.0, 4.0)])
      [(1.0, 3.0), (2.0, 5.0)]
    """
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def accuracy_over_flatness(groups: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Draws every run of a comparison: accuracy over C(w) and over the norm of the gradient, a colour a method."""
    labels = {"normalized_trace": "C(w) on training images", "grad_norm": "‖∇L‖ on training images"}
    with style.drawn(path, height=4, legend=("lower", 3)) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (field, xlabel) in zip(axes, labels.items(), strict=True):
            for (arm, rows), (color, _, marker) in _with_looks(groups.items()):
                x, y = [getattr(row, field) for row in rows], [row.test_accuracy for row in rows]
                axis.plot(x, y, marker, color=color, markersize=2.5, alpha=0.6, label=arm)
            axis.set(xlabel=xlabel, xscale="log")
            style.plain_log_ticks(axis.xaxis, (1, 3))
        axes[0].set_ylabel(_PANELS["test_accuracy"])


def trials(found: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path) -> None:
    """Draws the accuracy of each trial over each setting that was searched, on a logarithmic scale; a row an arm.

    A trial has its settings by name, ``accuracy`` and ``accuracy_std``; ``names`` are the settings of all arms.
    """
    with style.drawn(path, height=0.6 + 1.5 * len(found), width=1 + 1.6 * len(names)) as figure:
        axes = figure.subplots(len(found), len(names), squeeze=False, sharey="row", sharex="col")
        for row, (arm, points) in zip(axes, found.items(), strict=True):
            best = max(points, key=lambda point: point["accuracy"])
            for axis, name in zip(row, names, strict=True):
                if name not in best:
                    axis.set_visible(False)
                    continue
                x, y, spread = ([point[key] for point in points] for key in (name, "accuracy", "accuracy_std"))
                axis.errorbar(x, y, spread, fmt="o", color=style.COLORS[2], elinewidth=0.8)
                axis.plot(best[name], best["accuracy"], "o", color=style.COLORS[3], markersize=5, zorder=3)
                axis.set(xscale="log", xlabel=name)
                style.plain_log_ticks(axis.xaxis, (1,))
            row[0].set_ylabel(f"{arm}\naccuracy, %")


def _with_looks(things: Iterable[Any]) -> Iterator[tuple[Any, tuple[str, str, str]]]:
    """Each with a colour, a line style and a marker."""
    return zip(things, itertools.cycle(_LOOKS), strict=False)
