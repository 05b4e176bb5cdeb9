"""Figures 1, 2, 4 and 5 and table 3 from the numbers; labels say which methods they show, and in which order."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from experiments.figures import style
from experiments.figures.measures import Curvature, Ratio, SurfacePoint
from experiments.figures.snapshots import Trained
from experiments.system.tables import markdown, mean_and_deviation

Labels = Mapping[str, str]
Grid = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Coordinates [nx], [ny] and losses [ny, nx]."""

_NAMES = {
    "ratio_of_means": "approximation ratio",
    "top_eigenvalue": "largest eigenvalue λ₁",
    "trace": "Hessian trace Tr ∇²L",
    "normalized_trace": "normalized trace C(w)",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "train_accuracy": "training accuracy, %",
    "test_accuracy": "test accuracy, %",
}
# Of table 3.
_COLUMNS = {"gradient_norm": "‖∇L‖", "trace": "Tr ∇²L", "normalized_trace": "C(w)", "top_eigenvalue": "λ₁"}
_TITLES = {
    "test": "Test set, as in the paper; accuracy on all test images of the runs, the rest on {} of them",
    "train": "Training set, {} images",
}

_SPLITS = {"train": ("-", "o", "training set"), "test": ("--", "s", "test set")}
_COLORS = "viridis"
_FIRST, _SECOND = "along d₁", "along d₂"


def figure_1(curvature: Sequence[Curvature], ratios: Sequence[Ratio], labels: Labels, out: Path) -> None:
    """Approximation ratio, trace and largest eigenvalue on the training set."""
    on_train = [row for row in curvature if row.split == "train"]
    panels: dict[str, Sequence[Any]] = {"ratio_of_means": ratios, "trace": on_train, "top_eigenvalue": on_train}
    with style.drawn(out / "figure1.svg", 2.3, legend=("upper", len(labels))) as figure:
        axes = figure.subplots(1, 3)
        for axis, (field, rows) in zip(axes, panels.items(), strict=True):
            for method, label in labels.items():
                _over_epochs(axis, rows, method, field, label=label, marker="o", **style.look(method, labels))
            axis.set(xlabel="epoch", ylabel=_NAMES[field])
        for axis in axes[1:]:
            axis.set_ylim(bottom=0)


def figure_2(curvature: Sequence[Curvature], ratios: Sequence[Ratio], labels: Labels, out: Path) -> None:
    """One row per method: eigenvalue, trace and normalized trace on both sets over epochs, and the ratio against C."""
    fields = ("top_eigenvalue", "trace", "normalized_trace")
    with style.drawn(out / "figure2.svg", 0.4 + 1.55 * len(labels), legend=("upper", 2)) as figure:
        axes = figure.subplots(len(labels), 4, sharex="col", sharey="col", squeeze=False)
        for row, (method, label) in zip(axes, labels.items(), strict=True):
            color = style.look(method, labels)["color"]
            for axis, field in zip(row, fields, strict=False):
                for split, (line, marker, name) in _SPLITS.items():
                    rows = [r for r in curvature if r.split == split]
                    _over_epochs(axis, rows, method, field, label=name, marker=marker, linestyle=line, color=color)
                axis.set_yscale("log")
                style.plain_log_ticks(axis.yaxis)
            _against_ratio(row[3], curvature, ratios, method, color)
            row[0].set_ylabel(label, fontweight="bold")
        for top, bottom, field in zip(axes[0], axes[-1], (*fields, "ratio_of_means"), strict=True):
            top.set_title(_NAMES[field])
            bottom.set_xlabel("epoch")
        axes[-1, 3].set_xlabel("C(w), training set")


def figure_5(trained: Sequence[Trained], labels: Labels, out: Path) -> None:
    """Loss and accuracy on training batches, as trained on, and on the test set; both losses on one scale."""
    fields = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    with style.drawn(out / "figure5.svg", 4.2, legend=("upper", len(labels))) as figure:
        axes = figure.subplots(2, 2, sharex=True)
        for axis, field in zip(axes.flat, fields, strict=True):
            for method, label in labels.items():
                runs = [run.metrics for run in trained if run.recipe.method == method]
                rows = list(zip(*runs, strict=False))  # as far as all seeds are, if one is still training
                values = [[getattr(row, field) for row in seeds] for seeds in rows]
                style.band(axis, [row.epoch for row, *_ in rows], values, label=label, **style.look(method, labels))
            axis.set_ylabel(_NAMES[field])
        for axis in axes[0]:
            axis.set_ylim(0, max(a.get_ylim()[1] for a in axes[0]))
        axes[1, 0].set_ylim(0, 100)
        figure.align_ylabels(axes)
        for axis in axes[1]:
            axis.set_xlabel("epoch")


def _over_epochs(axis: Axes, rows: Sequence[Any], method: str, field: str, **line: Any) -> None:
    own = [row for row in rows if row.method == method]
    epochs = sorted({row.epoch for row in own})
    style.band(axis, epochs, [[getattr(row, field) for row in own if row.epoch == e] for e in epochs], **line)


def _against_ratio(
    axis: Axes, curvature: Sequence[Curvature], ratios: Sequence[Ratio], method: str, color: str
) -> None:
    """A point for each seed and epoch, darker for later epochs."""
    trace = {(r.seed, r.epoch): r.normalized_trace for r in curvature if r.method == method and r.split == "train"}
    own = [r for r in ratios if r.method == method and (r.seed, r.epoch) in trace]
    last = max(r.epoch for r in own)
    for r in own:
        axis.plot(trace[r.seed, r.epoch], r.ratio_of_means, "o", color=color, alpha=0.25 + 0.75 * r.epoch / last)
    axis.set_xscale("log")
    style.plain_log_ticks(axis.xaxis, (1, 3))


def figure_4(points: Sequence[SurfacePoint], labels: Labels, out: Path) -> None:
    """A column per method: the surface of the loss above, its contours below, all on one scale."""
    grids, low, high = _grids(points, labels)
    norm, levels = LogNorm(low, high), np.geomspace(low, high, 14)
    with style.drawn(out / "figure4.svg", 4.7) as figure:
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1), hspace=0)
        above, below = parts
        flat = below.subplots(1, len(labels), sharex=True, sharey=True, squeeze=False)[0]
        for i, (label, grid) in enumerate(zip(labels.values(), grids, strict=True)):
            steep = above.add_subplot(1, len(labels), i + 1, projection="3d")
            _surface(steep, grid, norm, high)
            steep.set_title(label, y=0.98)
            drawn = flat[i].contour(*grid, levels, cmap=_COLORS, norm=norm, linewidths=1)
            flat[i].clabel(drawn, levels[4::3], fmt="%.2g", fontsize=6)
            flat[i].plot(0, 0, "k+", markersize=6)
            flat[i].set(aspect="equal", xlabel=_FIRST)
        flat[0].set_ylabel(_SECOND)
        bar = below.colorbar(ScalarMappable(norm, _COLORS), ax=flat, label=_NAMES["train_loss"], shrink=0.9)
        style.plain_log_ticks(bar.ax.yaxis, (1, 2, 5))


def _surface(axis: Any, grid: Grid, norm: LogNorm, high: float) -> None:
    """One surface on axes in 3-d."""
    xs, ys, losses = grid
    axis.plot_surface(*np.meshgrid(xs, ys), losses, cmap=_COLORS, norm=norm, rcount=50, ccount=50, linewidth=0.1)
    axis.set(zlim=(0, high), xlabel=_FIRST, ylabel=_SECOND, zlabel=_NAMES["train_loss"])
    for side in (axis.xaxis, axis.yaxis, axis.zaxis):
        side.set_major_locator(MaxNLocator(3))
        side.labelpad = -6
    axis.tick_params(labelsize=6, pad=-3)
    axis.set_box_aspect((1, 1, 0.75), zoom=0.82)


def interactive(points: Sequence[SurfacePoint], labels: Labels, out: Path) -> Path:
    """Writes surface.html: surfaces to turn with the mouse, on one scale; needs no network when opened, some 5 MB."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ImportError("Interactive surfaces need plotly: pip install plotly.") from error
    grids, *ends = _grids(points, labels)
    low, high = np.log10(ends)
    specs = [[{"type": "surface"}] * len(labels)]
    page = make_subplots(rows=1, cols=len(labels), specs=specs, subplot_titles=list(labels.values()))
    bar = {"title": "training loss, log₁₀"}
    for i, (xs, ys, losses) in enumerate(grids, start=1):
        surface = go.Surface(
            x=xs,
            y=ys,
            z=losses,
            surfacecolor=np.log10(losses),
            cmin=low,
            cmax=high,
            colorscale=_COLORS.capitalize(),
            colorbar=bar,
            showscale=i == len(labels),
            hovertemplate="%{x:.3f}, %{y:.3f}: loss %{z:.3f}<extra></extra>",
        )
        page.add_trace(surface, row=1, col=i)
    height = {"title": _NAMES["train_loss"], "range": [0, 10**high]}
    camera = {"eye": {"x": 1.75, "y": 1.95, "z": 1.4}, "center": {"x": 0, "y": 0, "z": -0.1}}  # all labels inside
    page.update_scenes(xaxis_title=_FIRST, yaxis_title=_SECOND, zaxis=height, aspectmode="cube", camera=camera)
    page.update_layout(margin={"l": 10, "r": 10, "t": 60, "b": 10})
    page.write_html(out / "surface.html", include_plotlyjs=True, default_height="95vh")
    return out / "surface.html"


def grid_of(points: Sequence[SurfacePoint], method: str) -> Grid:
    """The surface of a method."""
    own = [point for point in points if point.method == method]
    xs, ys = (np.array(sorted({getattr(point, axis) for point in own})) for axis in "xy")
    losses = {(point.x, point.y): point.loss for point in own}
    return xs, ys, np.array([[losses[x, y] for x in xs] for y in ys])


def _grids(points: Sequence[SurfacePoint], labels: Labels) -> tuple[list[Grid], float, float]:
    """The surfaces of all methods, and the range of their losses together; losses below 1e-3 are drawn as zero."""
    grids = [grid_of(points, method) for method in labels]
    losses = np.stack([losses for _, _, losses in grids])
    return grids, max(float(losses.min()), 1e-3), float(losses.max())


class Cell(NamedTuple):
    """A mean over runs, and their sample standard deviation, NaN for a single run."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        text = f"{self.mean:.2f}"
        return text if self.deviation != self.deviation else f"{text} ± {self.deviation:.2f}"


def cells(curvature: Sequence[Curvature], trained: Sequence[Trained], method: str, split: str) -> list[Cell]:
    """The columns of a method: the measures on a split after the last epoch, then the accuracy on the split.

    That on the test set is on all of the evaluation data, not on the images of the measures.
    """
    own = [row for row in curvature if row.method == method and row.split == split]
    last = [row for row in own if row.epoch == max(r.epoch for r in own)]
    accuracies = [row.accuracy for row in last]
    if split == "test":
        accuracies = [run.metrics[-1].test_accuracy for run in trained if run.recipe.method == method]
    values = [[getattr(row, field) for row in last] for field in _COLUMNS]
    return [Cell(*mean_and_deviation(numbers)) for numbers in (*values, accuracies)]


def table_3(curvature: Sequence[Curvature], trained: Sequence[Trained], labels: Labels, out: Path) -> str:
    """Writes and returns table3.md: mean ± sample standard deviation over seeds, on both sets."""
    parts = []
    for split, title in _TITLES.items():
        rows = [row for row in curvature if row.split == split]
        seeds, epoch = len({row.seed for row in rows}), max(row.epoch for row in rows)
        spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        lines = [(label, *map(str, cells(curvature, trained, method, split))) for method, label in labels.items()]
        table = markdown(("method", *_COLUMNS.values(), "accuracy, %"), lines)
        parts.append(f"{title.format(rows[0].examples)}, after epoch {epoch}: {spread}.\n\n{table}")
    text = "\n".join(parts)
    (out / "table3.md").write_text(text)
    return text
