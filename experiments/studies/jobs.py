"""Many training runs: complete ones are read, the others are trained, in one process or several."""

import json
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from rich.console import Console

from experiments.data.inputs import note_of, signature_of
from experiments.settings import ranges
from experiments.settings.configs import Run
from experiments.settings.ranges import flat
from experiments.settings.recipes import Recipe
from experiments.settings.sources import is_own
from experiments.system import files
from experiments.system.interruptions import end_with_parent, held_back, raised
from experiments.system.progress import Bar
from experiments.system.quiet import quiet_libraries
from experiments.training import run_folder
from experiments.training.checkpoints import altered
from experiments.training.logs import EpochRow, read_epochs
from experiments.training.optimizers import METHODS
from experiments.training.train import train


class Job(NamedTuple):
    """One training run: the arm that it belongs to, its resolved recipe, and its folder."""

    arm: str
    recipe: Recipe
    folder: Path

    @classmethod
    def inside(cls, folder: Path, arm: str, recipe: Recipe, seed: int) -> Self:
        """A run of an arm, in a folder of its own inside another."""
        return cls(arm, replace(recipe, seed=seed), folder / (re.sub(r"[^\w.=-]+", "_", arm) + f"-seed{seed}"))

    @property
    def rows(self) -> list[EpochRow]:
        """The epochs so far."""
        return read_epochs(self.folder / "metrics.csv")


class Result(NamedTuple):
    """A row of runs.csv: a run after its last epoch. Losses are mean cross-entropies, accuracies are in percent.

    A run whose loss was not finite is scored at chance level, with an infinite loss.
    """

    arm: str
    seed: int
    settings: str
    """The learning rate, and what the method has of its own."""
    epochs: int
    test_accuracy: float
    """On the evaluation data, of the averaged weights if the recipe has an ``ema``; so are the next two."""
    test_loss: float = math.inf
    calibration_error: float | None = None
    raw_accuracy: float | None = None
    """On the same data, of the weights themselves."""
    train_loss: float = math.inf
    train_accuracy: float | None = None
    grad_norm: float | None = None
    curvature: float | None = None
    trace: float | None = None
    normalized_trace: float | None = None
    evaluations_per_step: float | None = None
    """How often a step evaluates the gradient, on average."""
    seconds: float | None = None
    """The time of all steps, without compilation and evaluation."""
    seconds_per_step: float | None = None
    error: str = ""


def carry_out(name: str, jobs: Sequence[Job], run: Run, processes: int = 1) -> None:
    """Trains the incomplete runs, in the given order. Interrupted runs resume where they stopped.

    From two processes on, each is bound to one core.

    Raises:
      FileExistsError: if a folder holds another run.
      ValueError: if a setting is out of its range.
      SystemExit: after Ctrl-C or SIGTERM, once the run is saved.
    """
    ranges.check(run, *(job.recipe for job in jobs))
    for job in jobs:
        run_folder.check_free(job.recipe, job.folder)
    missing = [job for job in jobs if not is_complete(job)]
    own = {job.recipe.dataset: job.recipe for job in reversed(missing) if is_own(job.recipe.dataset)}
    for recipe in own.values():
        print(note_of(recipe, run.data_dir))
    with Bar(console := Console(), len(jobs), len(jobs) - len(missing), "runs", "training") as bar:

        def show(job: Job) -> None:
            texts = f"{job.arm}, seed {job.recipe.seed}", f"accuracy {read_result(job).test_accuracy:.1f} %"
            bar.advance(*texts)
            if not console.is_terminal:
                bar.print(": ".join(texts), is_progress=True)

        if processes == 1:
            for job in missing:
                show(_carry_out(name, job, run))
        elif missing:
            _share_out(name, missing, run, processes, show)


def is_complete(job: Job) -> bool:
    """Whether a run has reached its last epoch, or a loss that is not finite; with damaged files it has to resume."""
    if altered(job.folder):
        return False
    return (job.folder / "failed.json").exists() or [row.epoch for row in job.rows][-1:] == [job.recipe.epochs]


def read_result(job: Job) -> Result:
    """The result of a complete run."""
    recipe, failed, settings = job.recipe, job.folder / "failed.json", flat(job.recipe)
    names = ["learning_rate", *METHODS[recipe.method].tunes] + ["ema"] * (recipe.ema is not None)
    start = job.arm, recipe.seed, " ".join(f"{name}={settings[name]:g}" for name in names), recipe.epochs
    if failed.exists():
        note = files.read_json(failed)
        if not (isinstance(note.get("chance"), (int, float)) and isinstance(note.get("error"), str)):
            raise ValueError(f"{failed} is damaged: it should hold chance and error. Delete it to train again.")
        return Result(*start, test_accuracy=note["chance"], error=note["error"])
    rows = job.rows
    last, seconds = rows[-1], sum(row.seconds for row in rows)
    measured = {name: value for name, value in last._asdict().items() if name in Result._fields}
    measured |= {"raw_accuracy": last.test_accuracy, "seconds": seconds, "seconds_per_step": seconds / last.step}
    if last.average_accuracy is not None:
        judged = last.average_accuracy, last.average_loss, last.average_calibration_error
        measured |= zip(("test_accuracy", "test_loss", "calibration_error"), judged, strict=True)
    return Result(*start, **measured)


def _carry_out(name: str, job: Job, run: Run) -> Job:
    try:
        train(name, job.recipe, replace(run, out=job.folder), quiet=True)
    except FloatingPointError as error:
        chance = 100 / signature_of(job.recipe, run.data_dir).num_classes
        (job.folder / "failed.json").write_text(json.dumps({"error": str(error), "chance": chance}) + "\n")
    return job


def _share_out(name: str, jobs: Sequence[Job], run: Run, processes: int, show: Callable[[Job], None]) -> None:
    """Runs jobs in several processes. At a signal each of them saves its run, and the signal is raised here."""
    with _pool(min(processes, len(jobs))) as pool:
        try:
            with held_back():  # also in the processes that start here, until they train
                futures = [pool.submit(_work, name, job, run) for job in jobs]
                pool.submit(int)  # A pool notices the end of those processes alone that ran before a submission.
            with raised():
                for future in as_completed(futures):
                    show(future.result())
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if isinstance(error, SystemExit):
                what = "what was training is saved" if run.keep else "what was training is not saved"
                print(f"Terminated: {what}. The same command goes on from there.")
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a process that trained was killed, perhaps for want of memory. The same command goes on from "
                    "there; with fewer --processes it takes less."
                ) from error
            raise


_stopped: list[SystemExit] = []
"""What ended a run of this process before its time: jobs that were handed to it already are not begun."""


def _work(name: str, job: Job, run: Run) -> Job:
    if _stopped:
        raise _stopped[0]
    try:
        return _carry_out(name, job, run)
    except SystemExit as stop:
        _stopped.append(stop)
        raise


def _pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes, each of which keeps what it has compiled for the jobs that follow."""
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for index in range(processes):
        cores.put(available[index % len(available)] if available else None)
    arguments = cores, jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return ProcessPoolExecutor(processes, context, _start_process, arguments)


def _start_process(cores: Any, cache_dir: str | None) -> None:
    """Binds a new process to one core, before jax counts them."""
    end_with_parent()
    quiet_libraries()
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
    jax.config.update("jax_compilation_cache_dir", cache_dir)
