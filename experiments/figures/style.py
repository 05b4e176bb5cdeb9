"""How the figures look: one size of text, colours that colour-blind readers can tell apart, bands over seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

WIDTH = 7.0
"""Inches: two columns of a paper."""

# Okabe and Ito's palette; line styles tell the methods apart without colours.
_LOOKS = {"base": ("#000000", "-"), "sam": ("#0072B2", "--"), "crsam": ("#D55E00", "-.")}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")

SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "svg.hashsalt": "figures",  # equal figures, equal bytes
    "svg.fonttype": "none",  # text stays text
}


def look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Colour and line style of one of the methods."""
    if method in _LOOKS:
        color, style = _LOOKS[method]
    else:
        others = [name for name in methods if name not in _LOOKS]
        color, style = _OTHERS[others.index(method) % len(_OTHERS)], ":"
    return {"color": color, "linestyle": style}


def band(axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], **line: Any) -> None:
    """The mean over seeds, and a band of ± one standard deviation, if there are several.

    Args:
      axis: where to draw.
      x: [n].
      values: [n, seeds].
      **line: properties of the line.
    """
    array = np.asarray(values, np.float64)
    mean = array.mean(axis=1)
    axis.plot(x, mean, **line)
    if array.shape[1] > 1:
        deviation = array.std(axis=1, ddof=1)
        axis.fill_between(x, mean - deviation, mean + deviation, color=line["color"], alpha=0.15, linewidth=0)


def plain_log_ticks(axis: Axis, multiples: Sequence[float] = (1, 2, 3, 5)) -> None:
    """Ticks at these multiples of powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Writes name.png, in 256 colours, and name.svg."""
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    figure.savefig(paths[0], dpi=150)
    with Image.open(paths[0]) as image:
        small = image.convert("RGB").quantize(256)
    small.save(paths[0], optimize=True)
    figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths
