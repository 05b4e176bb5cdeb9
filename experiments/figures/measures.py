"""The numbers behind figures 1 and 2 and table 3, of one network after one epoch."""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax

from crsam_jax import curvature
from experiments.figures.network import Losses
from experiments.figures.settings import Figures
from experiments.figures.trained import Snapshot
from experiments.inputs import Batch

T = TypeVar("T")


class Curvature(NamedTuple):
    """A row of curvature.csv. Errors are standard errors over random probes."""

    method: str
    seed: int
    epoch: int
    split: str
    """train or test."""
    examples: int
    loss: float
    accuracy: float
    """In percent."""
    gradient_norm: float
    trace: float
    trace_error: float
    normalized_trace: float
    normalized_trace_error: float
    top_eigenvalue: float
    top_eigenvalue_residual: float
    """An eigenvalue lies within this distance."""
    trace_seconds: float
    """For trace and gradient norm; in the first row with compilation, as below."""
    top_eigenvalue_seconds: float


class Ratio(NamedTuple):
    """A row of ratio.csv: the approximation ratio on training images; the errors are over the examples."""

    method: str
    seed: int
    epoch: int
    examples: int
    rho: float
    ratio_of_means: float
    ratio_of_means_error: float
    mean_of_ratios: float
    mean_of_ratios_error: float
    excluded: int
    """Examples whose loss hardly changes, left out of the mean of ratios."""
    seconds: float


def measure_curvature(
    losses: Losses, snapshot: Snapshot, batch: Batch, settings: Figures, run: tuple[str, int], split: str
) -> Curvature:
    """Loss, gradient norm, trace, normalized trace and largest eigenvalue on a set of images.

    Args:
      losses: of the network.
      snapshot: the network.
      batch: normalized images and labels.
      settings: numbers of probes and steps.
      run: method and seed, for the row.
      split: train or test, for the row.

    Returns:
      The row.
    """
    params, data = snapshot.params, _data(snapshot, batch, settings.batch_size)
    key = jax.random.key(0)  # the same probes for all checkpoints
    size = len(batch[1])
    loss, accuracy = (
        sum(float(fn(params, **part)) * len(part["batch"][1]) for part in data) / size
        for fn in (jax.jit(losses.mean), jax.jit(losses.accuracy))
    )
    normalized, trace_seconds = _timed(
        lambda: curvature.normalized_hessian_trace(losses.mean, params, data, key=key, num_probes=settings.num_probes)
    )
    top, top_seconds = _timed(
        lambda: curvature.top_eigenvalues(losses.mean, params, data, key=key, num_steps=settings.num_steps)
    )
    trace = normalized.trace
    return Curvature(
        *run, snapshot.epoch, split, size, loss, accuracy, normalized.gradient_norm, trace.mean, trace.standard_error,
        normalized.mean, normalized.standard_error, float(top.values[0]), float(top.residuals[0]), trace_seconds,
        top_seconds,
    )  # fmt: skip


def measure_ratio(
    losses: Losses, snapshot: Snapshot, batch: Batch, training_batch: int, settings: Figures, run: tuple[str, int]
) -> Ratio:
    """The approximation ratio, each batch with its own perturbation, as SAM has it.

    Args:
      losses: of the network.
      snapshot: the network.
      batch: normalized images and labels.
      training_batch: examples a batch, as many as in training.
      settings: the radius.
      run: method and seed, for the row.

    Returns:
      The row.
    """
    data, rho = _data(snapshot, batch, training_batch), settings.ratio_rho
    ratio, seconds = _timed(lambda: curvature.approximation_ratio(losses.each, snapshot.params, data, rho=rho))
    return Ratio(
        *run, snapshot.epoch, ratio.num_examples, rho, ratio.ratio_of_means, ratio.ratio_of_means_standard_error,
        ratio.mean_of_ratios, ratio.standard_error, ratio.num_excluded, seconds,
    )  # fmt: skip


def _data(snapshot: Snapshot, batch: Batch, batch_size: int) -> curvature.Batches:
    return curvature.Batches({"batch": batch}, batch_size, fixed={"model_state": snapshot.model_state})


def _timed(measure: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return measure(), time.perf_counter() - start
