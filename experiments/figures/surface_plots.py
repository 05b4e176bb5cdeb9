"""Figure 4: the loss around each method's minimum, as a surface and as contours, all on one scale."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from experiments.figures import style
from experiments.figures.surfaces import SurfacePoint

_CONTOURS = 14
_COLORS = "viridis"
_LOSS = "training loss"
_FIRST, _SECOND = "along d₁", "along d₂"

Grid = tuple[np.ndarray, np.ndarray, np.ndarray]


def grid_of(points: Sequence[SurfacePoint], method: str) -> Grid:
    """Coordinates [nx], [ny] and losses [ny, nx] of a method's surface."""
    own = [point for point in points if point.method == method]
    xs, ys = (np.array(sorted({getattr(point, axis) for point in own})) for axis in "xy")
    losses = {(point.x, point.y): point.loss for point in own}
    return xs, ys, np.array([[losses[x, y] for x in xs] for y in ys])


def figure_4(points: Sequence[SurfacePoint], labels: Mapping[str, str], out: Path) -> None:
    """A column a method: the surface above, its contours below.

    Args:
      points: of all methods.
      labels: of the methods, in the order to draw.
      out: folder for figure4.png and figure4.svg.
    """
    grids = {method: grid_of(points, method) for method in labels}
    low, high = _range(grids)
    norm, levels = LogNorm(low, high), np.geomspace(low, high, _CONTOURS)
    with plt.rc_context(style.SETTINGS):
        figure = plt.figure(figsize=(style.WIDTH, 4.7), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1), hspace=0)
        above, below = parts
        flat = below.subplots(1, len(labels), sharex=True, sharey=True, squeeze=False)[0]
        for i, (method, label) in enumerate(labels.items()):
            steep = above.add_subplot(1, len(labels), i + 1, projection="3d")
            _surface(steep, grids[method], norm, high)
            steep.set_title(label, y=0.98)
            drawn = flat[i].contour(*grids[method], levels, cmap=_COLORS, norm=norm, linewidths=1)
            flat[i].clabel(drawn, levels[4::3], fmt="%.2g", fontsize=6)
            flat[i].plot(0, 0, "k+", markersize=6)
            flat[i].set(aspect="equal", xlabel=_FIRST)
        flat[0].set_ylabel(_SECOND)
        bar = below.colorbar(plt.cm.ScalarMappable(norm, _COLORS), ax=flat, label=_LOSS, shrink=0.9)
        style.plain_log_ticks(bar.ax.yaxis, (1, 2, 5))
        style.save(figure, out, "figure4")


def _surface(axis: Any, grid: Grid, norm: LogNorm, high: float) -> None:
    """One surface on axes in 3-d."""
    xs, ys, losses = grid
    axis.plot_surface(*np.meshgrid(xs, ys), losses, cmap=_COLORS, norm=norm, rcount=50, ccount=50, linewidth=0.1)
    axis.set(zlim=(0, high), xlabel=_FIRST, ylabel=_SECOND, zlabel=_LOSS)
    for side in (axis.xaxis, axis.yaxis, axis.zaxis):
        side.set_major_locator(MaxNLocator(3))
        side.labelpad = -6
    axis.tick_params(labelsize=6, pad=-3)
    axis.set_box_aspect((1, 1, 0.75), zoom=0.82)


def interactive(points: Sequence[SurfacePoint], labels: Mapping[str, str], out: Path) -> Path:
    """Writes surface.html: surfaces to turn with the mouse, on one scale; needs no network when opened, some 5 MB.

    Args:
      points: of all methods.
      labels: of the methods, in the order to draw.
      out: folder of the page.

    Returns:
      Its path.

    Raises:
      ImportError: if plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ImportError("Interactive surfaces need plotly: pip install plotly.") from error
    grids = {method: grid_of(points, method) for method in labels}
    low, high = np.log10(_range(grids))
    page = make_subplots(
        rows=1, cols=len(labels), specs=[[{"type": "surface"}] * len(labels)], subplot_titles=list(labels.values())
    )
    bar = {"title": "training loss, log₁₀"}
    for i, (xs, ys, losses) in enumerate(grids.values(), start=1):
        surface = go.Surface(
            x=xs, y=ys, z=losses, surfacecolor=np.log10(losses), cmin=low, cmax=high, colorscale=_COLORS.capitalize(),
            colorbar=bar, showscale=i == len(labels), hovertemplate="%{x:.3f}, %{y:.3f}: loss %{z:.3f}<extra></extra>",
        )  # fmt: skip
        page.add_trace(surface, row=1, col=i)
    axes = {"xaxis_title": _FIRST, "yaxis_title": _SECOND, "zaxis": {"title": _LOSS, "range": [0, 10**high]}}
    camera = {"eye": {"x": 1.75, "y": 1.95, "z": 1.4}, "center": {"x": 0, "y": 0, "z": -0.1}}  # all labels inside
    page.update_scenes(**axes, aspectmode="cube", camera=camera)
    page.update_layout(margin={"l": 10, "r": 10, "t": 60, "b": 10})
    page.write_html(out / "surface.html", include_plotlyjs=True, default_height="95vh")
    return out / "surface.html"


def _range(grids: Mapping[str, Grid]) -> tuple[float, float]:
    """The range of the losses of all surfaces together; at 1e-3 a loss counts as zero."""
    losses = np.stack([losses for _, _, losses in grids.values()])
    return max(float(losses.min()), 1e-3), float(losses.max())
