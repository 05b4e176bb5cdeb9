"""Measuring all runs of a folder; what is on disk already is not measured again."""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments import tables
from experiments.figures.measures import Curvature, Ratio, measure_curvature, measure_ratio
from experiments.figures.network import Losses, examples, load, losses_of, signature_of
from experiments.figures.settings import Figures
from experiments.figures.surfaces import SurfacePoint, measure_surface
from experiments.figures.trained import Snapshot, Trained, snapshots
from experiments.inputs import Batch

CURVATURE, RATIO, SURFACE = "curvature.csv", "ratio.csv", "surface.csv"


def measure_all(
    trained: Sequence[Trained], settings: Figures, out: Path, with_curvature: bool = True, with_surface: bool = True
) -> None:
    """Adds what is missing to curvature.csv, ratio.csv and surface.csv.

    Args:
      trained: the runs.
      settings: what to measure.
      out: folder of the tables.
      with_curvature: curvature and approximation ratios at all epochs, for figures 1 and 2 and the table.
      with_surface: the surface around the last network of each method's first seed, for figure 4.

    Raises:
      FileExistsError: if ``out`` holds numbers measured with other settings.
    """
    _check_settings(settings, out)
    console, losses = Console(), None
    first_seed = min(run.recipe.seed for run in trained)
    by_seed = sorted(trained, key=lambda run: run.recipe.seed)
    for seed, group in itertools.groupby(by_seed, key=lambda run: run.recipe.seed):
        dataset = None  # one in memory at a time
        for run in group:
            dataset = dataset or load(run.recipe)
            signature = signature_of(run.recipe, dataset)
            losses = losses or losses_of(run.recipe, signature)
            kept = snapshots(run, signature, settings.epochs)
            batches = {
                "train": examples(dataset.train, settings.train_examples, dataset),
                "test": examples(dataset.test, settings.test_examples, dataset),
            }
            if with_curvature:
                _measure_curvatures(run, kept, batches, losses, settings, out, console)
                few = examples(dataset.train, settings.ratio_examples, dataset)
                _measure_ratios(run, kept, few, losses, settings, out, console)
            if with_surface and seed == first_seed:
                _measure_surface(run, kept[-1], batches["train"], losses, settings, out, console)


def _measure_curvatures(
    run: Trained, kept: Sequence[Snapshot], batches: dict[str, Batch], losses: Losses, settings: Figures, out: Path,
    console: Console,
) -> None:  # fmt: skip
    name = run.recipe.method, run.recipe.seed
    done = {row[:4] for row in tables.read(out / CURVATURE, Curvature)}
    for snapshot, (split, batch) in itertools.product(kept, batches.items()):
        if (*name, snapshot.epoch, split) in done:
            continue
        row = measure_curvature(losses, snapshot, batch, settings, name, split)
        tables.append(out / CURVATURE, [row])
        console.print(
            f"{run.label}, seed {row.seed}, epoch {row.epoch}, {split}: loss {row.loss:.3f}, gradient norm "
            f"{row.gradient_norm:.3f}, trace {row.trace:.1f} ± {row.trace_error:.1f}, "
            f"largest eigenvalue {row.top_eigenvalue:.2f}"
        )


def _measure_ratios(
    run: Trained, kept: Sequence[Snapshot], batch: Batch, losses: Losses, settings: Figures, out: Path,
    console: Console,
) -> None:  # fmt: skip
    name = run.recipe.method, run.recipe.seed
    done = {row[:3] for row in tables.read(out / RATIO, Ratio)}
    for snapshot in kept:
        if (*name, snapshot.epoch) in done:
            continue
        row = measure_ratio(losses, snapshot, batch, run.recipe.batch_size, settings, name)
        tables.append(out / RATIO, [row])
        console.print(f"{run.label}, seed {row.seed}, epoch {row.epoch}: ratio {row.ratio_of_means:.3f}")


def _measure_surface(
    run: Trained, last: Snapshot, batch: Batch, losses: Losses, settings: Figures, out: Path, console: Console
) -> None:
    name = run.recipe.method, run.recipe.seed
    done = [row for row in tables.read(out / SURFACE, SurfacePoint) if row[:3] == (*name, last.epoch)]
    if len(done) >= settings.surface_points**2:
        return
    start = time.perf_counter()
    tables.append(out / SURFACE, measure_surface(losses, last, batch, settings, name))
    seconds = time.perf_counter() - start
    console.print(f"{run.label}, seed {run.recipe.seed}: {settings.surface_points}² points in {seconds:.0f} s")


def _check_settings(settings: Figures, out: Path) -> None:
    """The numbers of a folder are of one kind."""
    out.mkdir(parents=True, exist_ok=True)
    path, text = out / "settings.json", json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise FileExistsError(f"{out} holds numbers measured with other settings; name another folder with --out.")
    path.write_text(text)
