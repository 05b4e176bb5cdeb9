"""SAM-k: pay every k steps, beginning with the first."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax.policies.policy import counters, policy
from crsam_jax.step.types import Params


class PeriodicState(NamedTuple):
    """State of :func:`periodic`: int32 scalars, and the state of the wrapped transformation.

    Attributes:
      steps: steps so far.
      full_steps: how many of them were full.
      period: k.
      inner_state: the state of the wrapped transformation.
    """

    steps: jax.Array
    full_steps: jax.Array
    period: jax.Array
    inner_state: Any

    def is_due(self, grads: Any) -> jax.Array:
        """Whether the next step is a full one; it does not depend on the gradient."""
        del grads
        return self.steps % self.period == 0


def periodic(tx: optax.GradientTransformation, k: int) -> optax.GradientTransformationExtraArgs:
    """The full method at every k-th step, beginning with the first; the plain gradient between.

    A step costs 1 + (n−1)/k evaluations on average, where n are those of the full method.

    Args:
      tx: a member of the family.
      k: the period, an integer ≥ 1. k = 1 is ``tx`` itself.

    Returns:
      A transformation that also takes ``full_step``, a bool, at ``update``: the choice, made by the caller.

    Raises:
      TypeError, ValueError: if k is not an integer ≥ 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = crsam_jax.periodic(crsam_jax.sam(loss_fn, rho=0.5), k=2)
      >>> w = jnp.array([0.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(3):
      ...   gradient, state = tx.update(jax.grad(loss_fn)(w), state, w)
      ...   print(gradient)
      [0.  4.5]
      [0. 4.]
      [0.  4.5]

    References:
      Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714,
      which calls this SAM-k and improves it by :func:`look`.
    """
    check_period(k)

    def start(params: Params, inner_state: Any) -> PeriodicState:
        del params
        return PeriodicState(*counters(), jnp.asarray(k, jnp.int32), inner_state)

    return policy(tx, start)


def check_period(k: int) -> None:
    """Checks that k is an integer ≥ 1."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
