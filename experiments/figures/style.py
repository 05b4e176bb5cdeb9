"""How figures look: one size of text, colours that colour-blind readers can tell apart, bands over seeds."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

WIDTH = 7.0
"""Inches: two columns of a paper."""

COLORS = ("#000000", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, without its yellow."""

# Line styles tell the methods apart without colours.
_LOOKS = {"base": (COLORS[0], "-"), "sam": (COLORS[2], "--"), "crsam": (COLORS[3], "-.")}
_OTHERS = COLORS[4:]

_SETTINGS: dict[Any, Any] = {
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


@contextlib.contextmanager
def drawn(path: Path, height: float, width: float = WIDTH, legend: tuple[str, int] | None = None) -> Iterator[Figure]:
    """An empty figure, in inches, which is saved once it is drawn: as PNG, or as SVG and a PNG of 256 colours.

    A legend is "upper" or "lower" and a number of columns, and names what the first axes hold.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        if legend:
            where, columns = legend
            place: Any = f"outside {where} center"
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc=place, ncols=columns)
        picture = path.with_suffix(".png")
        figure.savefig(picture, dpi=150)
        if path.suffix == ".svg":
            with Image.open(picture) as image:
                small = image.convert("RGB").quantize(256)
            small.save(picture, optimize=True)
            figure.savefig(path, metadata={"Date": None})


def look(method: str, methods: Iterable[str]) -> dict[str, Any]:
    """Colour and line style of one of the methods."""
    others = [name for name in methods if name not in _LOOKS]
    color, style = _LOOKS.get(method) or (_OTHERS[others.index(method) % len(_OTHERS)], ":")
    return {"color": color, "linestyle": style}


def band(axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], **line: Any) -> None:
    """The mean over seeds of values [len(x), seeds], and a band of ± one standard deviation, if there are several."""
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
