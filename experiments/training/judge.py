"""Evaluation of a network: losses, accuracy and calibration on a batch, gradient norm and curvature."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

import crsam_jax
from experiments.data.inputs import Batch, Signature
from experiments.networks.augment import normalize, scaled
from experiments.networks.network import Network

BINS = 15
"""Of confidence, equally wide, for the calibration error (Guo et al. 2017)."""
PROBE_RHO = 0.05
"""Distance at which curvature is measured after an epoch, the same for all methods."""


class Evaluation(NamedTuple):
    """Mean cross-entropy, accuracy in percent and expected calibration error, over all evaluation data."""

    loss: float
    accuracy: float
    calibration_error: float


class Judge(NamedTuple):
    """Functions of params and model state, in evaluation mode.

    Attributes:
      evaluate: jitted; from params, model state, a batch, and which classes may be answered (or None: all), to sums
        over the examples: loss, right answers, examples; then confidence, right answers and examples in each bin.
      probe: jitted; from params, model state and a batch to the norm of the gradient and the curvature vᵀHv along it.
      loss: the mean loss of a batch, ``(params, model_state, batch) -> loss``.
      remeasured: jitted; from params, model state and a batch to the model state with the batch's statistics.
    """

    evaluate: Callable[[Any, Any, Batch, ArrayLike | None], jax.Array]
    probe: Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]
    loss: Callable[[Any, Any, Batch], jax.Array]
    remeasured: Callable[[Any, Any, Batch], Any]


def make_judge(network: Network, signature: Signature, mesh: Mesh) -> Judge:
    """Builds the functions that judge a network."""
    everywhere = NamedSharding(mesh, P())

    def prepared(images: jax.Array) -> jax.Array:
        return scaled(normalize(images, signature.mean, signature.std), signature.image_shape)

    def logits(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        return network.logits(params, model_state, prepared(images))

    @partial(jax.jit, out_shardings=everywhere)
    def evaluate(params: Any, model_state: Any, batch: Batch, classes: ArrayLike | None) -> jax.Array:
        answers = logits(params, model_state, batch[0])
        return _sums(answers if classes is None else jnp.where(classes, answers, -jnp.inf), batch[1])

    def loss(params: Any, model_state: Any, batch: Batch) -> jax.Array:
        answers = logits(params, model_state, batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(answers, batch[1]))

    @partial(jax.jit, out_shardings=everywhere)
    def probe(params: Any, model_state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        measure = crsam_jax.crsam_gradient(loss, rho=PROBE_RHO, alpha=0.0, beta=0.0)
        _, seen = measure(params, model_state=model_state, batch=batch)
        return seen.grad_norm, seen.curvature

    @partial(jax.jit, out_shardings=everywhere)
    def remeasured(params: Any, model_state: Any, batch: Batch) -> Any:
        return network.remeasured(params, model_state, prepared(batch[0]))

    return Judge(evaluate, probe, loss, remeasured)


def evaluate(
    judge: Judge, params: Any, model_state: Any, batches: Iterator[Batch], classes: ArrayLike | None = None
) -> Evaluation:
    """Evaluates a network over all batches; ``classes`` says which ones may be answered."""
    sums = [np.asarray(judge.evaluate(params, model_state, batch, classes), float) for batch in batches]
    (loss, correct, examples), bins = np.split(np.sum(sums, axis=0), [3])
    confidence, right, _ = bins.reshape(3, -1)
    return Evaluation(loss / examples, 100 * correct / examples, float(np.sum(np.abs(confidence - right)) / examples))


def _sums(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What ``Judge.evaluate`` returns, in one array; examples of the label −1 do not count."""
    is_real = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(is_real, labels, 0))
    confidence, is_right = jnp.max(jax.nn.softmax(logits), -1), is_real & (jnp.argmax(logits, -1) == labels)
    columns, in_bins = (jnp.stack([jnp.where(is_real, x, 0), is_right, is_real]) for x in (losses, confidence))
    bins = jnp.zeros((3, BINS)).at[:, jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)].add(in_bins)
    return jnp.concatenate([jnp.sum(columns, axis=1), bins.ravel()])
