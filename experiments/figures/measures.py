"""What is measured of one network after one epoch, without augmentation: what figures 1, 2 and 4 and table 3 show."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crsam_jax import curvature, landscape
from experiments.data import subset
from experiments.data.dataset import Split
from experiments.data.inputs import Batch, Signature
from experiments.figures.snapshots import Snapshot
from experiments.networks.augment import normalize, scaled
from experiments.networks.network import make_network
from experiments.settings.configs import Figures
from experiments.settings.recipes import Recipe

T = TypeVar("T")
Loss = Callable[[Any, Batch, Any], jax.Array]


class Curvature(NamedTuple):
    """A row of curvature.csv. Errors are standard errors over random probes."""

    method: str
    seed: int
    epoch: int
    split: str  # train or test
    examples: int
    loss: float
    accuracy: float  # in percent
    gradient_norm: float
    trace: float
    trace_error: float
    normalized_trace: float
    normalized_trace_error: float
    top_eigenvalue: float
    top_eigenvalue_residual: float  # an eigenvalue lies within this distance
    trace_seconds: float  # for trace and gradient norm; in the first row with compilation, as below
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
    excluded: int  # examples whose loss hardly changes, left out of the mean of ratios
    seconds: float


class SurfacePoint(NamedTuple):
    """A row of surface.csv: the loss at w + x d₁ + y d₂."""

    method: str
    seed: int
    epoch: int
    x: float
    y: float
    loss: float


class Losses(NamedTuple):
    """Functions of params, a batch of normalized images and labels, and model state.

    Each is one object for all checkpoints, so that it is compiled once.
    """

    mean: Loss  # cross-entropy, the batch's mean
    each: Loss  # of each example, [examples]
    accuracy: Loss  # in percent


def losses_of(recipe: Recipe, signature: Signature) -> Losses:
    """The loss of a recipe's network in evaluation mode, with stored statistics."""
    network = make_network(recipe.network, signature)

    def each(params: Any, batch: Batch, model_state: Any) -> jax.Array:
        images, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(network.logits(params, model_state, images), labels)

    def mean(params: Any, batch: Batch, model_state: Any) -> jax.Array:
        return jnp.mean(each(params, batch, model_state))

    def accuracy(params: Any, batch: Batch, model_state: Any) -> jax.Array:
        images, labels = batch
        return 100 * jnp.mean(jnp.argmax(network.logits(params, model_state, images), -1) == labels)

    return Losses(mean, each, accuracy)


def examples(split: Split, count: int, signature: Signature) -> Batch:
    """The same number of examples of each class, ``count`` in all, or all if there are no more; normalized."""
    if count < len(split.labels):
        split = subset.take_per_class(split, max(1, count // signature.num_classes), seed=0)
    images = normalize(jnp.asarray(split.images), signature.mean, signature.std)
    return scaled(images, signature.image_shape), jnp.asarray(split.labels)


def measure_curvature(losses: Losses, snapshot: Snapshot, batch: Batch, settings: Figures, split: str) -> Curvature:
    """Loss, gradient norm, trace, normalized trace and largest eigenvalue on images of a split."""
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
        *snapshot.key,
        split,
        size,
        loss,
        accuracy,
        normalized.gradient_norm,
        trace.mean,
        trace.standard_error,
        normalized.mean,
        normalized.standard_error,
        float(top.values[0]),
        float(top.residuals[0]),
        trace_seconds,
        top_seconds,
    )


def measure_ratio(losses: Losses, snapshot: Snapshot, batch: Batch, settings: Figures, batch_size: int) -> Ratio:
    """The approximation ratio, each batch, as large as in training, with its own perturbation, as SAM has it."""
    data, rho = _data(snapshot, batch, batch_size), settings.ratio_rho
    ratio, seconds = _timed(lambda: curvature.approximation_ratio(losses.each, snapshot.params, data, rho=rho))
    return Ratio(
        *snapshot.key,
        ratio.num_examples,
        rho,
        ratio.ratio_of_means,
        ratio.ratio_of_means_standard_error,
        ratio.mean_of_ratios,
        ratio.standard_error,
        ratio.num_excluded,
        seconds,
    )


def measure_surface(losses: Losses, snapshot: Snapshot, batch: Batch, settings: Figures) -> list[SurfacePoint]:
    """The loss along two orthogonal filter-normalized random directions, the same for all networks; x runs fastest.

    After Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.
    """
    axes = landscape.filter_normalized_directions(snapshot.params, jax.random.key(0))
    grid = np.linspace(-settings.surface_extent, settings.surface_extent, settings.surface_points)
    data = _data(snapshot, batch, settings.batch_size)
    # One point at a time: convolutions batched over params are slow on CPU.
    values = landscape.surface(losses.mean, snapshot.params, (axes[0], axes[1]), grid, grid, data, chunk_size=1)
    return [
        SurfacePoint(*snapshot.key, float(x), float(y), float(loss))
        for y, row in zip(grid, values, strict=True)
        for x, loss in zip(grid, row, strict=True)
    ]


def _data(snapshot: Snapshot, batch: Batch, batch_size: int) -> curvature.Batches:
    return curvature.Batches({"batch": batch}, batch_size, fixed={"model_state": snapshot.model_state})


def _timed(measure: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return measure(), time.perf_counter() - start
