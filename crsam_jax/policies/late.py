"""Late phase: the plain gradient first, the full method towards the end of training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax.policies.policy import counters, policy
from crsam_jax.step.checks import check_number, check_whole_number
from crsam_jax.step.types import Params


class LateState(NamedTuple):
    """State of :func:`late`.

    Attributes:
      steps: int32, steps so far.
      full_steps: int32, how many of them were full.
      start: int32, steps before the first full one.
      inner_state: the state of the wrapped transformation.
    """

    steps: jax.Array
    full_steps: jax.Array
    start: jax.Array
    inner_state: Any

    def is_due(self, grads: Params) -> jax.Array:
        """Whether the next step is a full one; it does not depend on the gradient."""
        del grads
        return self.steps >= self.start


def late(
    tx: optax.GradientTransformation, start: float, total_steps: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """The plain gradient in the first steps, the full method in all that follow.

    With s of T steps before the first full one a step costs 1 + (n−1)(1 − s/T) evaluations on average, where n are
    those of the full method: SAM in the last eighth of training costs 1.125.

    Args:
      tx: a member of the family, or another policy.
      start: how many steps to wait, an integer ≥ 0; or, with ``total_steps``, the fraction of them, in [0, 1].
      total_steps: T, an integer ≥ 1; None if ``start`` counts steps.

    Returns:
      A transformation that also takes ``full_step`` at ``update``, see :func:`crsam_jax.periodic`.

    Raises:
      TypeError, ValueError: if ``start`` is neither such an integer nor such a fraction, or ``tx`` no transformation.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = crsam_jax.late(crsam_jax.sam(loss_fn, rho=0.5), start=0.75, total_steps=4)
      >>> w = jnp.array([0.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(4):
      ...   gradient, state = tx.update(jax.grad(loss_fn)(w), state, w)
      ...   print(gradient)
      [0. 4.]
      [0. 4.]
      [0. 4.]
      [0.  4.5]

    References:
      Zhou et al., "Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training", ICLR 2025,
      arXiv 2410.10373: SAM in the last few epochs nearly equals SAM throughout.
    """
    first = _first_full_step(start, total_steps)

    def begin(params: Params, inner_state: Any) -> LateState:
        del params
        return LateState(*counters(), jnp.asarray(first, jnp.int32), inner_state)

    return policy(tx, begin)


def _first_full_step(start: Any, total_steps: int | None) -> int:
    if total_steps is None:
        if isinstance(start, float):
            raise TypeError(f"start must be a whole number, got {start!r}; a fraction needs total_steps too.")
        check_whole_number("start", start, at_least=0)
        return int(start)
    check_whole_number("total_steps", total_steps, at_least=1)
    check_number("start", start)
    check_number("1 - start", 1 - start)
    return round(start * total_steps)
