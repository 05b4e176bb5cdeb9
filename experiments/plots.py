"""Plots of training runs."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

# Okabe and Ito's colour-blind safe palette, without its yellow.
_COLORS = ("#000000", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":", "-.")

_PANELS = (
    ("test_accuracy", "test accuracy, %", False),
    ("test_loss", "test loss", False),
    ("train_accuracy", "training accuracy, %\n(against the noisy labels)", False),
    ("curvature", "curvature vᵀHv\non the training set", True),
)


TRAINING_PANELS = (
    ("test_accuracy", "test accuracy, %", False),
    ("test_loss", "test loss", True),
    ("train_accuracy", "training accuracy, %", False),
    ("train_loss", "training loss", True),
)
"""For runs of recipes."""


def curves(
    records: Sequence[Any],
    labels: Mapping[str, str],
    path: Path,
    panels: Sequence[tuple[str, str, bool]] = _PANELS,
) -> None:
    """Draws four measures over training: a line for the mean over seeds, a band for ± one standard deviation.

    The horizontal axis is the share of the method's own epochs, since methods may train for different ones.
    """
    methods = list(dict.fromkeys(r.method for r in records))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for axis, (field, title, logarithmic) in zip(axes.flat, panels, strict=True):
        for method, (style, color) in zip(methods, itertools.product(_STYLES, _COLORS), strict=False):
            _line(axis, [r for r in records if r.method == method], field, labels[method], color, style)
        axis.set_ylabel(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("share of the training run, %")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(methods), 4), frameon=False
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(axis: Axes, records: Sequence[Any], field: str, label: str, color: str, style: str) -> None:
    epochs = sorted({r.epoch for r in records})
    values = np.array([[getattr(r, field) for r in records if r.epoch == epoch] for epoch in epochs])
    mean, std = values.mean(axis=1), values.std(axis=1, ddof=1) if values.shape[1] > 1 else 0
    share = 100 * np.array(epochs) / epochs[-1]
    axis.plot(share, mean, color=color, linestyle=style, label=label, linewidth=1.6)
    if values.shape[1] > 1:
        axis.fill_between(share, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
