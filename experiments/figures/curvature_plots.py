"""Figures 1 and 2: curvature and approximation ratio over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.figures import style
from experiments.figures.measures import Curvature, Ratio

_AXES = {
    "ratio_of_means": "approximation ratio",
    "top_eigenvalue": "largest eigenvalue λ₁",
    "trace": "Hessian trace Tr ∇²L",
    "normalized_trace": "normalized trace C(w)",
}
_SPLITS = {"train": ("-", "o", "training set"), "test": ("--", "s", "test set")}


def figure_1(curvature: Sequence[Curvature], ratios: Sequence[Ratio], labels: Mapping[str, str], out: Path) -> None:
    """Approximation ratio, trace and largest eigenvalue on the training set over epochs.

    Args:
      curvature: rows of all runs.
      ratios: rows of all runs.
      labels: of the methods, in the order to draw.
      out: folder for figure1.png and figure1.svg.
    """
    on_train = [row for row in curvature if row.split == "train"]
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(1, 3, figsize=(style.WIDTH, 2.3), layout="constrained")
        panels: list[tuple[str, Sequence[Any]]] = [
            ("ratio_of_means", ratios), ("trace", on_train), ("top_eigenvalue", on_train)
        ]  # fmt: skip
        for axis, (field, rows) in zip(axes, panels, strict=True):
            for method, label in labels.items():
                _over_epochs(axis, rows, method, field, label=label, marker="o", **style.look(method, list(labels)))
            axis.set(xlabel="epoch", ylabel=_AXES[field])
        for axis in axes[1:]:
            axis.set_ylim(bottom=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(labels))
        style.save(figure, out, "figure1")


def figure_2(curvature: Sequence[Curvature], ratios: Sequence[Ratio], labels: Mapping[str, str], out: Path) -> None:
    """One row a method: eigenvalue, trace and normalized trace on both sets over epochs, and C against the ratio.

    Args:
      curvature: rows of all runs.
      ratios: rows of all runs.
      labels: of the methods, in the order to draw.
      out: folder for figure2.png and figure2.svg.
    """
    fields = ("top_eigenvalue", "trace", "normalized_trace")
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(
            len(labels), 4, figsize=(style.WIDTH, 0.4 + 1.55 * len(labels)), layout="constrained", sharex="col",
            sharey="col", squeeze=False,
        )  # fmt: skip
        for row, (method, label) in zip(axes, labels.items(), strict=True):
            color = style.look(method, list(labels))["color"]
            for axis, field in zip(row, fields, strict=False):
                for split, (line, marker, name) in _SPLITS.items():
                    rows = [r for r in curvature if r.split == split]
                    _over_epochs(axis, rows, method, field, label=name, marker=marker, linestyle=line, color=color)
                axis.set_yscale("log")
                style.plain_log_ticks(axis.yaxis)
            _against_ratio(row[3], curvature, ratios, method, color)
            row[3].set_xscale("log")
            style.plain_log_ticks(row[3].xaxis, (1, 3))
            row[0].set_ylabel(label, fontweight="bold")
        titles = (*(_AXES[field] for field in fields), _AXES["ratio_of_means"])
        for top, bottom, title in zip(axes[0], axes[-1], titles, strict=True):
            top.set_title(title)
            bottom.set_xlabel("epoch")
        axes[-1, 3].set_xlabel("C(w), training set")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        style.save(figure, out, "figure2")


def _over_epochs(axis: Axes, rows: Sequence[Curvature] | Sequence[Ratio], method: str, field: str, **line: Any) -> None:
    own = [row for row in rows if row.method == method]
    epochs = sorted({row.epoch for row in own})
    style.band(axis, epochs, [[getattr(row, field) for row in own if row.epoch == e] for e in epochs], **line)


def _against_ratio(
    axis: Axes, curvature: Sequence[Curvature], ratios: Sequence[Ratio], method: str, color: str
) -> None:
    """A point for each seed and epoch, darker as training goes on."""
    trace = {(r.seed, r.epoch): r.normalized_trace for r in curvature if r.method == method and r.split == "train"}
    own = [r for r in ratios if r.method == method and (r.seed, r.epoch) in trace]
    last = max(r.epoch for r in own)
    for r in own:
        axis.plot(trace[r.seed, r.epoch], r.ratio_of_means, "o", color=color, alpha=0.25 + 0.75 * r.epoch / last)
