"""The loss on a line and on a plane through parameter space."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crsam_jax._checks import brief, whole_number
from crsam_jax._loss import LossFn
from crsam_jax.curvature._batches import Data, ExampleCount, num_batches
from crsam_jax.curvature._mean_loss import MeanLoss, Progress, binder, like_params, per_loss, widened_params

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


def line(
    loss_fn: LossFn,
    params: Any,
    direction: Any,
    coordinates: Any,
    data: Data | None = None,
    *,
    chunk_size: int = 1,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> Array:
    """The loss at w + x d for each coordinate x; :func:`surface` describes the arguments.

    Returns:
      The losses, [m], float64, for coordinates of shape [m].

    Raises:
      TypeError, ValueError: as :func:`surface`.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import landscape
      >>> print(landscape.line(lambda w: jnp.sum(w**2), jnp.zeros(2), jnp.array([1.0, 0.0]), [-1.0, 0.0, 2.0]))
      [1. 0. 4.]
    """
    xs = _checked_axis("coordinates", coordinates)
    return _losses_at(loss_fn, params, (direction,), xs[:, None], data, chunk_size, has_aux, example_count, progress)


def surface(
    loss_fn: LossFn,
    params: Any,
    directions: tuple[Any, Any],
    xs: Any,
    ys: Any,
    data: Data | None = None,
    *,
    chunk_size: int = 1,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> Array:
    """The loss at w + x d₁ + y d₂ for each x and y.

    The data are gone through once; each batch is evaluated at all points before the next one is fetched.
    Costs ``len(xs) · len(ys)`` losses.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, a real floating scalar, the mean over the batch's examples: the
        training loss, or an error rate. Its arguments after params are taken by name. Models with BatchNorm
        are evaluated with fixed statistics.
      params: w, a pytree of real floating arrays; half precision is widened to float32 first.
      directions: d₁ and d₂, pytrees like params, of any length.
      xs: coordinates along d₁, [nx].
      ys: coordinates along d₂, [ny].
      data: a batch, which is a mapping of argument names to values, or an iterable of batches.
      chunk_size: how many points are evaluated at once, batched over params; memory grows with it. 1: one after the
        other, the fastest for convolutions on CPU, which batching over params turns into grouped ones.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`crsam_jax.curvature.gradient_norm`.
      progress: called as ``progress(done, total)`` after each chunk of each batch; ``total`` is None if data
        has no length.

    Returns:
      The losses, [ny, nx], float64, rows along y as ``matplotlib``'s ``contour`` takes them. Points where the loss
      is not finite stay so.

    Raises:
      TypeError: if ``loss_fn``, ``data`` or a batch has the wrong form, or params is traced.
      ValueError: if directions do not fit params, coordinates are not vectors of finite numbers, or data is empty.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import landscape
      >>> axes = (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
      >>> print(landscape.surface(lambda w: w[0] ** 2 + 10 * w[1], jnp.zeros(2), axes, [0.0, 1.0, 2.0], [0.0, 1.0]))
      [[ 0.  1.  4.]
       [10. 11. 14.]]
    """
    xs, ys = _checked_axis("xs", xs), _checked_axis("ys", ys)
    if len(directions) != 2:
        raise ValueError(f"directions must be two pytrees like params, got {len(directions)}.")
    points = np.stack([axis.ravel() for axis in np.meshgrid(xs, ys)], axis=1)
    losses = _losses_at(loss_fn, params, tuple(directions), points, data, chunk_size, has_aux, example_count, progress)
    return losses.reshape(len(ys), len(xs))


def _losses_at(
    loss_fn: LossFn,
    params: Any,
    directions: tuple[Any, ...],
    points: Array,
    data: Data | None,
    chunk_size: int,
    has_aux: bool,
    example_count: ExampleCount | None,
    progress: Progress | None,
) -> Array:
    """The losses at ``points``, coordinates of shape [points, directions]."""
    chunk_size = whole_number("chunk_size", chunk_size, at_least=1)
    params = widened_params(params)
    directions = tuple(like_params(f"directions[{i}]", d, params) for i, d in enumerate(directions))
    loss = MeanLoss(loss_fn, data, has_aux, example_count)
    chunks = _chunks(points, chunk_size)
    batches = 1 if data is None else num_batches(data)
    total = None if batches is None else len(chunks) * batches
    done = 0

    chunk_losses = _chunk_losses(loss_fn, has_aux)

    def kernel(batch: Any) -> jax.Array:
        nonlocal done
        losses = []
        for chunk in chunks:
            losses.append(jax.block_until_ready(chunk_losses(params, directions, chunk, batch)))
            done += 1
            if progress is not None:
                progress(done, total)
        return jnp.concatenate(losses)

    losses = loss.mean(kernel)
    return np.asarray(losses, np.float64)[: len(points)]


def _chunks(points: Array, chunk_size: int) -> list[Array]:
    """Chunks of one size, so that one program serves all; the last point fills up the last chunk."""
    filled = np.pad(points, ((0, -len(points) % chunk_size), (0, 0)), mode="edge")
    return list(filled.reshape(-1, chunk_size, points.shape[1]))


@per_loss
def _chunk_losses(
    loss_fn: LossFn, has_aux: bool, params: Any, directions: Any, points: jax.Array, batch: Any
) -> jax.Array:
    """The losses at some points, [points]; a single one is not batched over params."""
    loss = binder(loss_fn, has_aux)(batch)

    def loss_at(point: jax.Array) -> jax.Array:
        return loss(_combined(params, directions, point))

    return loss_at(points[0])[None] if len(points) == 1 else jax.vmap(loss_at)(points)


def _combined(params: Any, directions: tuple[Any, ...], coordinates: jax.Array) -> Any:
    """The point w + Σ_k c_k d_k."""
    return jax.tree.map(
        lambda w, *ds: w + sum(c.astype(w.dtype) * d for c, d in zip(coordinates, ds, strict=True)),
        params,
        *directions,
    )


def _checked_axis(name: str, coordinates: Any) -> Array:
    values = np.asarray(coordinates, np.float64)
    if values.ndim != 1 or not values.size or not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be a vector of finite numbers, got shape {values.shape}: {brief(values)}.")
    return values
