"""Plots of comparisons and searches."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke

from experiments.figures import style
from experiments.training.logs import EpochRow

_LOOKS = [
    (color, line, marker)
    for line, marker in zip(("-", "--", ":", "-.") * 2, "os^vDPX*", strict=True)
    for color in style.COLORS
]

# The colours of main methods, whose points have their names beside them, and of others that were tuned. What was not
# tuned is grey, and differs by its markers.
_NAMED = {"base": style.COLORS[0], "sam": style.COLORS[2], "crsam": style.COLORS[3], "msam": style.COLORS[4]}
_TUNED_LOOKS = [(color, marker) for marker in "sv^D" for color in style.COLORS[5:]]
_GREY, _GREY_MARKERS = "#a0a0a0", "v^<>DPXd*ph8H1234+x"
_HALO = withStroke(linewidth=2, foreground="white")
_ARROW = r"$\downarrow$"

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
        axes[0, 0].set_title("lines: means over seeds; bands: ± one standard deviation", loc="left")


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
        axis.set_title("lines: means over seeds; bars at the end: ± one standard deviation", loc="left")


def accuracy_over_cost(
    summaries: Sequence[Mapping[str, Any]], path: Path, tuned: Collection[str] | None = None
) -> None:
    """Draws the mean accuracy of each arm, with its standard error, over the quartiles of seconds of a run; the front.

    The front consists of the arms that no other beats in both. An arm far below the first one is an arrow at the lower
    edge, with its accuracy in the legend: a failure would press all others into one line. Arms that are not ``tuned``
    are grey; None means that all are. SGD, SAM, CR-SAM and MSAM have their names beside their points.
    """
    points = [s for s in summaries if s["seconds_median"] is not None]
    if not points:
        return
    lowest = _lower_edge([s["test_accuracy"] for s in points])
    with style.drawn(path, height=4.6, legend=("lower", 3)) as figure:
        axis = figure.subplots()
        for s, (color, marker) in zip(points, _looks([s["arm"] for s in points], tuned), strict=True):
            seconds, error = s["seconds_median"], (s["test_accuracy_std"] or 0) / np.sqrt(s["seeds"])
            spread = [[seconds - s["seconds_low"]], [s["seconds_high"] - seconds]]
            height, label, order = s["test_accuracy"], s["label"], 1 if color == _GREY else 2
            if height < lowest:
                height, marker, error, label = lowest, _ARROW, 0, f"{label}: {height:.1f} %"
            elif s["arm"] in _NAMED:
                is_base = s["arm"] == "base"  # below its point: MSAM is close to it
                axis.annotate(
                    label,
                    (seconds, height),
                    xytext=(0, -5 if is_base else 5),
                    textcoords="offset points",
                    color=color,
                    weight="bold",
                    ha="center",
                    va="top" if is_base else "bottom",
                    zorder=5,
                    path_effects=[_HALO],
                )
            axis.errorbar(
                seconds,
                height,
                error,
                spread,
                marker=marker,
                color=color,
                label=label,
                zorder=order,
                ls="none",
                elinewidth=0.8,
                markersize=5,
            )
        best = front([(s["seconds_median"], s["test_accuracy"]) for s in points])
        axis.step(*zip(*best, strict=True), where="post", color="#d0d0d0", zorder=0)
        axis.set(xlabel="seconds of training", ylabel=_PANELS["test_accuracy"], xscale="log")
        grey = "" if tuned is None else "; grey: not tuned"
        note = "bars: ± one standard error of accuracy, quartiles of seconds; line: the front"
        axis.set_title(note + grey, loc="left")
        style.plain_log_ticks(axis.xaxis)


def _lower_edge(accuracies: Sequence[float]) -> float:
    """Twice as far below the first arm as the best is above it, or 5 % below."""
    first, *_ = accuracies
    return first - max(5.0, 2 * (max(accuracies) - first))


def _looks(arms: Sequence[str], tuned: Collection[str] | None) -> list[tuple[str, str]]:
    """Colour and marker of each arm."""
    looks, markers = itertools.cycle(_TUNED_LOOKS), itertools.cycle(_GREY_MARKERS)
    return [
        (_GREY, next(markers))
        if tuned is not None and arm not in tuned
        else (_NAMED[arm], "o")
        if arm in _NAMED
        else next(looks)
        for arm in arms
    ]


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


def accuracy_over_flatness(
    groups: Mapping[str, Sequence[Any]], labels: Mapping[str, str], path: Path, tuned: Collection[str] | None = None
) -> None:
    """Draws every run of a comparison: accuracy over C(w) and over the norm of the gradient.

    It has the lower edge of :func:`accuracy_over_cost`. An arm whose mean is below it is one arrow there, with its
    mean in the legend; runs of the others that are below it are arrows too. ``groups`` and ``labels`` are by arm; arms
    that are not ``tuned`` are grey.
    """
    fields = {"normalized_trace": "C(w) on training images", "grad_norm": "‖∇L‖ on training images"}
    means = {arm: float(np.mean([row.test_accuracy for row in rows])) for arm, rows in groups.items()}
    lowest = _lower_edge(list(means.values()))
    shown = [arm for arm in groups if means[arm] >= lowest]
    with style.drawn(path, height=4.4, legend=("lower", 3)) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (field, xlabel) in zip(axes, fields.items(), strict=True):
            inside = [getattr(row, field) for arm in shown for row in groups[arm]]
            low, high = min(inside) / 1.1, max(inside) * 1.1
            for (arm, rows), (color, marker) in zip(groups.items(), _looks(list(groups), tuned), strict=True):
                draw = partial(
                    axis.plot, ls="none", color=color, alpha=0.6, zorder=1 if color == _GREY else 2
                )  # of x, y, marker, size and label
                x, y = np.array([(getattr(row, field), row.test_accuracy) for row in rows]).T
                if arm in shown:
                    is_above = y >= lowest
                    draw(x[is_above], y[is_above], marker=marker, markersize=2.5, label=labels[arm])
                    arrows = x[~is_above]
                else:
                    draw([], [], marker=_ARROW, markersize=5, label=f"{labels[arm]}: {means[arm]:.1f} %")
                    arrows = np.clip([np.median(x)], low, high)
                draw(arrows, np.full(len(arrows), lowest), marker=_ARROW, markersize=5)
            axis.set(xlabel=xlabel, xscale="log", xlim=(low / 1.05, high * 1.05))
            style.plain_log_ticks(axis.xaxis, (1, 3) if high > 10 * low else (1, 2, 3, 5))
        axes[0].set_ylabel(_PANELS["test_accuracy"])
        grey = "" if tuned is None else "; grey: not tuned"
        axes[0].set_title(f"a point per run; arrows: below the edge{grey}", loc="left")


def trials(found: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path) -> None:
    """Draws the accuracy of each trial over each setting that was searched, on a logarithmic scale; a row per arm.

    A trial has its settings by name, ``accuracy`` and ``accuracy_std``; ``names`` are the settings of all arms.
    """
    with style.drawn(path, height=0.8 + 1.6 * len(found), width=1 + 1.6 * len(names)) as figure:
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
                axis.tick_params(labelbottom=True)  # the last row of a column may be empty
                style.plain_log_ticks(axis.xaxis, (1, 3) if max(x) < 30 * min(x) else (1,))
            row[0].set_ylabel(f"{arm}\naccuracy, %")
        note = (
            "A point per trial on the held-out data; bars: ± one standard deviation over its seeds; orange: the best."
        )
        figure.suptitle(note, x=0.01, ha="left", fontsize=8, wrap=True)  # one panel is narrower than the note


def _with_looks(things: Iterable[Any]) -> Iterator[tuple[Any, tuple[str, str, str]]]:
    """Each with a colour, a line style and a marker."""
    return zip(things, itertools.cycle(_LOOKS), strict=False)
