"""LookSAM: pay every k steps, and reuse what was found on the steps between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax.policies.periodic import check_period
from crsam_jax.policies.policy import check_reads_gradient, counters, policy
from crsam_jax.step import trees
from crsam_jax.step.checks import check_number
from crsam_jax.step.types import Params

# The sums behind the projection lose about this many units in the last place.
_PROJECTION_ULPS = 16


class LookState(NamedTuple):
    """State of :func:`look`.

    Attributes:
      steps: int32, steps so far.
      full_steps: int32, how many of them were full.
      period: int32, k.
      orthogonal: unit vector along the part of the latest full result that is orthogonal to its g; a tree like
        params in at least float32.
      inner_state: the state of the wrapped transformation.
    """

    steps: jax.Array
    full_steps: jax.Array
    period: jax.Array
    orthogonal: Any
    inner_state: Any

    def is_due(self, grads: Any) -> jax.Array:
        """Whether the next step is a full one; it does not depend on the gradient."""
        del grads
        return self.steps % self.period == 0


def look(tx: optax.GradientTransformation, k: int = 10, strength: float = 0.7) -> optax.GradientTransformationExtraArgs:
    """LookSAM: between the full steps, reuse the part of the latest full result that is orthogonal to its g.

    With r the result of the full step, the direction kept is r_v = r − (⟨g, r⟩/‖g‖²) g; the k − 1 steps after it
    return g + strength · ‖g‖ r_v/‖r_v‖. Norms and dot products run over the whole tree. Costs one vector of the size
    of params. Where r has the direction of g, up to rounding (ρ = 0, or a step that fell back on g), there is nothing
    to reuse, and the steps after it return g. So does a step whose sum overflows.

    Args:
      tx: a member of the family; the paper's is :func:`crsam_jax.sam`.
      k: the period, an integer ≥ 1. k = 1 is ``tx`` itself.
      strength: the paper's α ≥ 0, a number.

    Returns:
      A transformation that also takes ``full_step`` at ``update``, see :func:`periodic`.

    Raises:
      TypeError, ValueError: if k is not an integer ≥ 1, or strength is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: 0.5 * (w[0] ** 2 + 3 * w[1] ** 2)
      >>> tx = crsam_jax.look(crsam_jax.sam(loss_fn, rho=0.5), k=2, strength=1.0)
      >>> w = jnp.array([3.0, 1.0])  # g = [3, 3], g⁺ ∝ [6 + √½, 6 + 3√½]
      >>> state = tx.init(w)
      >>> full, state = tx.update(jax.grad(loss_fn)(w), state, w)
      >>> reused, state = tx.update(jax.grad(loss_fn)(w), state, w)
      >>> print(reused[1])  # of [3, 3] + √18 · [-√½, √½] = [0, 6]
      6.0

    References:
      Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714,
      algorithm 1, whose gradient and projection are global; known codes take norms per tensor or per element.
    """
    check_period(k)
    check_number("strength", strength)

    def start(params: Params, inner_state: Any) -> LookState:
        check_reads_gradient("look", inner_state)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, trees.wide_dtype(p)), params)
        return LookState(*counters(), jnp.asarray(k, jnp.int32), zeros, inner_state)

    def reuse(state: LookState, grads: Params) -> Params:
        length = trees.scaled_norm(grads)
        moved = trees.wide_map(lambda g, u: g + strength * length.value * u, grads, state.orthogonal)
        moved = trees.cast_like(moved, grads)
        return trees.select(trees.all_finite(moved), moved, grads)

    def remember(state: LookState, result: Params, grads: Params) -> LookState:
        return state._replace(orthogonal=trees.cast_like(_orthogonal(result, grads), state.orthogonal))

    return policy(tx, start, between=reuse, remember=remember)


def _orthogonal(result: Any, grads: Any) -> Any:
    """The unit vector of the part of ``result`` orthogonal to g; zeros where that part is rounding noise."""
    along = trees.unit(grads)
    projection = trees.dot(along, result)
    rest = trees.wide_map(lambda r, u: r - projection * u, result, along)
    is_noise = trees.norm(rest) <= _noise(result) * trees.norm(result)
    return jax.tree.map(lambda leaf: jnp.where(is_noise, 0, leaf), trees.unit(rest))


def _noise(result: Any) -> float:
    """The relative rounding error: that of the result in its own dtypes plus that of the projection in a wide one."""
    own = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(result)), default=0.0)
    return own + _PROJECTION_ULPS * float(jnp.finfo(trees.wide_dtype(result)).eps)
