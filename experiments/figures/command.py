"""One command per figure: measure what is missing, then draw."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.data.inputs import load, signature_in_memory
from experiments.figures import measures
from experiments.figures.drawings import figure_1, figure_2, figure_4, figure_5, interactive, table_3
from experiments.figures.measures import Curvature, Ratio, SurfacePoint
from experiments.figures.snapshots import Trained, find_runs, snapshots
from experiments.settings import ranges
from experiments.settings.configs import Figures, What
from experiments.system import tables
from experiments.training import run_folder

CURVATURE, RATIO, SURFACE = "curvature.csv", "ratio.csv", "surface.csv"

_SAID = {
    CURVATURE: ", epoch {epoch}, {split}: loss {loss:.3f}, gradient norm {gradient_norm:.3f}, "
    "trace {trace:.1f} ± {trace_error:.1f}, largest eigenvalue {top_eigenvalue:.2f}",
    RATIO: ", epoch {epoch}: ratio {ratio_of_means:.3f}",
    SURFACE: ": {side}² points in {elapsed:.0f} s",
}


def figures(what: What, folder: Path, settings: Figures = Figures(), out: Path | None = None) -> Path:  # noqa: B008
    """Measure curvature and loss surfaces of trained networks, and draw the paper's figures and table 3.

    Args:
      what: One figure, table3, html (surfaces to turn with the mouse), or all figures and the table.
      folder: Folder of the training runs, results/RECIPE.
      settings: What to measure. What was measured before is not measured again.
      out: Folder for numbers and figures; FOLDER/figures by default.
    """
    ranges.check(settings)
    out = out or folder / "figures"
    trained = find_runs(folder)
    labels = {run.recipe.method: run.label for run in trained}
    out.mkdir(parents=True, exist_ok=True)
    if what != "figure5":
        measure_all(trained, settings, out, what not in ("figure4", "html"), what in ("all", "figure4", "html"))
    curvature, ratios = tables.read(out / CURVATURE, Curvature), tables.read(out / RATIO, Ratio)
    points = tables.read(out / SURFACE, SurfacePoint)
    if what in ("all", "figure1"):
        figure_1(curvature, ratios, labels, out)
    if what in ("all", "figure2"):
        figure_2(curvature, ratios, labels, out)
    if what in ("all", "figure4"):
        figure_4(points, labels, out)
    if what in ("all", "figure5"):
        figure_5(trained, labels, out)
    if what in ("all", "table3"):
        tables.show(table_3(curvature, trained, labels, out))
    if what == "html":
        interactive(points, labels, out)
    print(f"Numbers and figures are in {out}.")
    return out


def measure_all(trained: Sequence[Trained], settings: Figures, out: Path, curvature: bool, surface: bool) -> None:
    """Adds what is missing to curvature.csv and ratio.csv (all epochs), and to surface.csv (the last, first seed)."""
    if trained[0].recipe.dataset == "imagenet2012":
        raise ValueError("Figures are drawn from data sets that fit into memory, and ImageNet does not.")
    held = "numbers measured with other settings"
    run_folder.keep_settings(dataclasses.asdict(settings), out / "settings.json", held)
    losses = None  # the same for all runs, so compiled once
    first_seed = min(run.recipe.seed for run in trained)
    for run in sorted(trained, key=lambda run: run.recipe.seed):
        data = load(run.recipe)
        signature = signature_in_memory(run.recipe, data)
        losses = losses or measures.losses_of(run.recipe, signature)
        kept = snapshots(run, signature, settings.epochs)
        train = measures.examples(data.train, settings.train_examples, signature)
        add = partial(_add, out, f"{run.label}, seed {run.recipe.seed}")
        if curvature:
            splits = {"train": train, "test": measures.examples(data.test, settings.test_examples, signature)}
            for snapshot, (split, batch) in itertools.product(kept, splits.items()):
                measure: Any = partial(measures.measure_curvature, losses, snapshot, batch, settings, split)
                add(CURVATURE, Curvature, (*snapshot.key, split), measure)
            few = measures.examples(data.train, settings.ratio_examples, signature)
            for snapshot in kept:
                measure = partial(measures.measure_ratio, losses, snapshot, few, settings, run.recipe.batch_size)
                add(RATIO, Ratio, snapshot.key, measure)
        if surface and run.recipe.seed == first_seed:
            measure = partial(measures.measure_surface, losses, kept[-1], train, settings)
            add(SURFACE, SurfacePoint, kept[-1].key, measure, settings.surface_points**2)


def _add(
    out: Path, run: str, file: str, row_type: Any, key: tuple[Any, ...], measure: Callable[[], Any], count: int = 1
) -> None:
    """Measures and appends the rows that begin with a key, unless the file holds as many."""
    if sum(row[: len(key)] == key for row in tables.read(out / file, row_type)) >= count:
        return
    start, found = time.perf_counter(), measure()
    rows = found if isinstance(found, list) else [found]
    tables.append(out / file, rows)
    values = {"side": math.isqrt(len(rows)), "elapsed": time.perf_counter() - start}
    Console().print(run + _SAID[file].format(**values, **rows[0]._asdict()))
