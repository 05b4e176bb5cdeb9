"""ASAM's ascent: each weight moves in proportion to its own size."""

from typing import Any

import jax
import jax.numpy as jnp

from crsam_jax.ascents.ascent import Ascent, broadcast_mask, no_state
from crsam_jax.step import trees
from crsam_jax.step.checks import check_number
from crsam_jax.step.types import GradientFn, Mask, Params


def adaptive_ascent(eta: float = 0.01, adaptive: Mask | None = None) -> Ascent:
    """The scale-invariant direction of ASAM: v = T² g/‖T g‖ with T = diag(abs(w) + η).

    One norm over the whole tree; ‖v‖ is not 1. Where T g is zero or not finite, v is zero.

    Args:
      eta: η ≥ 0, added to abs(w) so that small weights still move. Unitless.
      adaptive: which leaves are scaled, as a prefix of params with bool leaves or a function from params to
        one; the others have T = 1. ``None``, the default, scales all of them. The authors' code scales
        the tensors whose name contains "weight" and leaves biases alone.

    Raises:
      ValueError: if eta is negative or not finite.
      TypeError: if eta is not a number.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> params, grads = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
      >>> direction, _ = crsam_jax.adaptive_ascent(eta=0.0).apply(grads, (), params)
      >>> print(direction * 5**0.5)  # T²g = [1, 4] over ‖Tg‖ = √5
      [1. 4.]

    References:
      Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks", ICML 2021, eq. 7 and algorithm 1.
    """
    check_number("eta", eta)

    def scale(grad: jax.Array, param: jax.Array, is_adaptive: bool) -> jax.Array:
        if not is_adaptive:
            return grad
        return (jnp.abs(param).astype(trees.wide_dtype(param)) + eta) * grad

    def apply(grads: Any, state: Any, params: Params, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del gradient_fn
        which = broadcast_mask("adaptive", True if adaptive is None else adaptive, params)
        scaled = jax.tree.map(scale, trees.widen(grads), params, which)
        return jax.tree.map(scale, trees.unit(scaled), params, which), state

    return Ascent(no_state, apply)
