"""Plots of comparisons and searches."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import style
from experiments.logs import EpochRow

# Okabe and Ito's colour-blind safe palette, without its yellow.
_COLORS = ("#000000", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LOOKS: list[dict[str, Any]] = [
    {"linestyle": style, "color": color} for style, color in itertools.product(("-", "--", ":", "-."), _COLORS)
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
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(2, 2, figsize=(style.WIDTH, 5), sharex=True, layout="constrained")
        for axis, field in zip(axes.flat, fields, strict=True):
            for (label, seeds), look in zip(runs.items(), itertools.cycle(_LOOKS), strict=False):
                share = [100 * row.epoch / seeds[0][-1].epoch for row in seeds[0]]
                values = [[getattr(epochs[i], field) for epochs in seeds] for i in range(len(share))]
                style.band(axis, share, values, label=label, **look)
            axis.set_ylabel(_PANELS[field])
            if field in ("curvature", "train_loss"):
                axis.set_yscale("log")
        for axis in axes[1]:
            axis.set_xlabel("share of the training run, %")
        _finish(figure, axes[0, 0], len(runs), path)


def accuracy_over_time(runs: Runs, path: Path) -> None:
    """Draws the mean test accuracy over the mean seconds of training, and each arm's end with its spread."""
    with plt.rc_context(style.SETTINGS):
        figure, axis = plt.subplots(figsize=(style.WIDTH, 3.6), layout="constrained")
        for (label, seeds), look in zip(runs.items(), itertools.cycle(_LOOKS), strict=False):
            seconds = np.cumsum([[row.seconds for row in rows] for rows in seeds], axis=1).mean(axis=0)
            accuracy = np.array([[row.test_accuracy for row in rows] for rows in seeds])
            axis.plot(seconds, accuracy.mean(axis=0), label=label, alpha=0.6, **look)
            spread = accuracy[:, -1].std(ddof=1) if len(seeds) > 1 else None
            axis.errorbar(seconds[-1], accuracy[:, -1].mean(), spread, fmt="o", capsize=2, color=look["color"])
        axis.set(xlabel="seconds of training", ylabel=_PANELS["test_accuracy"], xscale="log")
        _finish(figure, axis, len(runs), path)


def accuracy_over_cost(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the mean accuracy of each arm, with its standard error, over the quartiles of seconds of a run; the front.

    The front is what no other arm beats in both. An arm far below the first one stands at the lower edge as an arrow,
    with its accuracy in the legend: a failure would press all others into one line.
    """
    points = [s for s in summaries if s["seconds_median"] is not None]
    if not points:
        return
    lowest = _lowest_shown([s["test_accuracy"] for s in points])
    with plt.rc_context(style.SETTINGS):
        figure, axis = plt.subplots(figsize=(style.WIDTH, 4.4), layout="constrained")
        for number, (s, look) in enumerate(zip(points, itertools.cycle(_LOOKS), strict=False)):
            seconds, error = s["seconds_median"], (s["test_accuracy_std"] or 0) / np.sqrt(s["seeds"])
            spread = [[seconds - s["seconds_low"]], [s["seconds_high"] - seconds]]
            height, marker, label = s["test_accuracy"], "os^vDPX*"[number // len(_COLORS) % 8], s["label"]
            if height < lowest:
                height, marker, error, label = lowest, r"$\downarrow$", 0, f"{label}: {height:.1f} %"
            axis.errorbar(seconds, height, error, spread, marker=marker, ls="none", color=look["color"], label=label)
        best = front([(s["seconds_median"], s["test_accuracy"]) for s in points])
        axis.step(*zip(*best, strict=True), where="post", color="#bbbbbb", zorder=0)
        axis.set(xlabel="seconds of training", ylabel=_PANELS["test_accuracy"], xscale="log")
        style.plain_log_ticks(axis.xaxis)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _lowest_shown(accuracies: Sequence[float]) -> float:
    """Twice as far below the first arm as the best is above it, and at least five points, in %."""
    return accuracies[0] - max(5.0, 2 * (max(accuracies) - accuracies[0]))


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
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 4), sharey=True, layout="constrained")
        for number, ((arm, rows), look) in enumerate(zip(groups.items(), itertools.cycle(_LOOKS), strict=False)):
            marker = "os^vDPX*"[number // len(_COLORS) % 8]
            for axis, field in zip(axes, labels, strict=True):
                x = [getattr(row, field) for row in rows]
                accuracy = [row.test_accuracy for row in rows]
                axis.plot(x, accuracy, marker, color=look["color"], markersize=2.5, alpha=0.6, label=arm)
        for axis, label in zip(axes, labels.values(), strict=True):
            axis.set(xlabel=label, xscale="log")
            style.plain_log_ticks(axis.xaxis, (1, 3))
        axes[0].set_ylabel(_PANELS["test_accuracy"])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def heat_maps(grids: Sequence[Any], cells: Sequence[Mapping[Any, tuple[float, float]]], seeds: int, path: Path) -> None:
    """Draws the mean of each point of some grids as a colour, on one scale, with its standard error in figures.

    Args:
      grids: with a title and two axes each, see :mod:`experiments.sensitivity`.
      cells: of each grid: from a point to mean and standard deviation.
      seeds: that they are of.
      path: of the picture.
    """
    means = [mean for grid in cells for mean, _ in grid.values()]
    scale: dict[str, Any] = {"vmin": min(means), "vmax": max(means), "cmap": "viridis"}
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(1, len(grids), figsize=(3.2 * len(grids), 3), layout="constrained", squeeze=False)
        for axis, grid, found in zip(axes[0], grids, cells, strict=True):
            values = [[found[x, y][0] for x in grid.across.values] for y in grid.up.values]
            image = axis.imshow(values, origin="lower", aspect="auto", **scale)
            for (column, x), (row, y) in itertools.product(enumerate(grid.across.values), enumerate(grid.up.values)):
                mean, deviation = found[x, y]
                color = "white" if mean < (scale["vmin"] + scale["vmax"]) / 2 else "black"
                text = f"{mean:.1f}\n±{deviation / np.sqrt(seeds):.1f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
            axis.set_xticks(range(len(grid.across.values)), [f"{x:g}" for x in grid.across.values])
            axis.set_yticks(range(len(grid.up.values)), [f"{y:g}" for y in grid.up.values])
            axis.set(title=grid.title, xlabel=grid.across.sign, ylabel=grid.up.sign)
        figure.colorbar(image, ax=axes[0], label=_PANELS["test_accuracy"])
        figure.savefig(path, dpi=150)
        plt.close(figure)


def trials(found: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path) -> None:
    """Draws the accuracy of each trial over each setting that was searched, on a logarithmic scale; a row an arm.

    Args:
      found: of each arm the trials: settings by name, ``accuracy`` and ``accuracy_std``.
      names: of the settings of all arms.
      path: of the picture.
    """
    size = (1 + 1.6 * len(names), 0.6 + 1.5 * len(found))
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(
            len(found), len(names), figsize=size, layout="constrained", squeeze=False, sharey="row", sharex="col"
        )
        for row, (arm, points) in zip(axes, found.items(), strict=True):
            best = max(points, key=lambda point: point["accuracy"])
            for axis, name in zip(row, names, strict=True):
                if name not in best:
                    axis.set_visible(False)
                    continue
                x, y, spread = ([point[key] for point in points] for key in (name, "accuracy", "accuracy_std"))
                axis.errorbar(x, y, spread, fmt="o", color=_COLORS[2], elinewidth=0.8)
                axis.plot(best[name], best["accuracy"], "o", color=_COLORS[3], markersize=5, zorder=3)
                axis.set(xscale="log", xlabel=name)
                style.plain_log_ticks(axis.xaxis, (1,))
            row[0].set_ylabel(f"{arm}\naccuracy, %")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _finish(figure: Figure, axis: Axes, count: int, path: Path) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=min(count, 4), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
