"""AE-SAM's policy: pay where the gradient is unusually large."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax.policies.policy import check_reads_gradient, counters, policy
from crsam_jax.step import trees
from crsam_jax.step.checks import check_number, value_at
from crsam_jax.step.types import Params, ScalarOrSchedule


class AdaptivePolicyState(NamedTuple):
    """State of :func:`adaptive_policy`.

    Attributes:
      steps: int32, steps so far.
      full_steps: int32, how many of them were full.
      full_fraction: float32, their share.
      mean: running mean μ of ‖g‖².
      variance: running variance σ² of ‖g‖².
      decay: d, the decay of both running values.
      threshold: c of the next step.
      inner_state: the state of the wrapped transformation.
    """

    steps: jax.Array
    full_steps: jax.Array
    full_fraction: jax.Array
    mean: jax.Array
    variance: jax.Array
    decay: jax.Array
    threshold: jax.Array
    inner_state: Any

    def is_due(self, grads: Any) -> jax.Array:
        """Whether the step with this gradient is a full one."""
        square = _squared_norm(grads, self)
        mean, variance = _running(self, square)
        return square >= mean + self.threshold * jnp.sqrt(variance)


def adaptive_policy(
    tx: optax.GradientTransformation, threshold: ScalarOrSchedule = 0.0, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """AE-SAM's rule: a full step where ‖g‖² is large for its running mean and variance, else the plain gradient.

    With s = ‖g‖², μ ← d μ + (1−d) s, then σ² ← d σ² + (1−d) (s−μ)²; the step is full if s ≥ μ + c σ. μ and σ²
    begin at 0, so that the first steps are full. A gradient that is not finite passes through and leaves μ and σ² as
    they are.

    Args:
      tx: a member of the family.
      threshold: c, a number or schedule of any sign. The paper lets it fall linearly over training:
        ``optax.linear_schedule(1.0, -1.0, total_steps)``.
      decay: d in [0, 1).

    Returns:
      A transformation that also takes ``full_step`` at ``update``, see :func:`periodic`. Its state has the
      share of full steps so far: ``optax.tree.get(opt_state, "full_fraction")``.

    Raises:
      TypeError, ValueError: if decay is not in [0, 1), or threshold is neither a number nor a schedule.

    Example:
      >>> import jax, jax.numpy as jnp, optax, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = crsam_jax.adaptive_policy(crsam_jax.sam(loss_fn), threshold=0.0)
      >>> w = jnp.array([1.0])
      >>> state, update = tx.init(w), jax.jit(tx.update)
      >>> for size in [1.0] * 20 + [0.1] * 20:  # large gradients, then small ones
      ...   _, state = update(jnp.array([size]), state, w)
      >>> print(state.full_fraction)
      0.5

    References:
      Jiang et al., "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023, arXiv 2304.14647.
      The rule and d = 0.9, c from 1 to −1 follow secondary descriptions of the paper; its initial values of μ
      and σ² could not be verified.
    """
    if not callable(threshold) and not isinstance(threshold, jax.core.Tracer):
        check_number("threshold (its size)", abs(threshold) if hasattr(threshold, "__abs__") else threshold)
    check_number("decay", decay, below=1)

    def start(params: Params, inner_state: Any) -> AdaptivePolicyState:
        check_reads_gradient("adaptive_policy", inner_state)
        dtype = trees.wide_dtype(params)
        steps, full_steps = counters()
        return AdaptivePolicyState(
            steps=steps,
            full_steps=full_steps,
            full_fraction=jnp.zeros((), jnp.float32),
            mean=jnp.zeros((), dtype),
            variance=jnp.zeros((), dtype),
            decay=jnp.asarray(decay, dtype),
            threshold=value_at(threshold, jnp.zeros((), jnp.int32), dtype),
            inner_state=inner_state,
        )

    def advance(state: AdaptivePolicyState, grads: Params) -> AdaptivePolicyState:
        mean, variance = _running(state, _squared_norm(grads, state))
        return state._replace(
            full_fraction=state.full_steps.astype(jnp.float32) / state.steps.astype(jnp.float32),
            mean=mean,
            variance=variance,
            threshold=value_at(threshold, state.steps, state.mean.dtype),
        )

    return policy(tx, start, advance=advance)


def _squared_norm(grads: Any, state: AdaptivePolicyState) -> jax.Array:
    return (trees.norm(grads) ** 2).astype(state.mean.dtype)


def _running(state: AdaptivePolicyState, square: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = state.decay * state.mean + (1 - state.decay) * square
    variance = state.decay * state.variance + (1 - state.decay) * (square - mean) ** 2
    is_finite = jnp.isfinite(variance)
    return jnp.where(is_finite, mean, state.mean), jnp.where(is_finite, variance, state.variance)
