"""What a step returns where something is not defined: the method, else SAM's gradient, else g.

=====================================================  ==================  =======
what is found                                          what is returned    counted
=====================================================  ==================  =======
ρ = 0                                                  g                   no
g is not finite, zero, or gives no direction           g                   yes
ρ or a number of the rule is negative or not finite    g                   yes
L⁺ or g⁺ is not finite                                 g                   yes
the penalty is not defined (L⁻ or g⁻ is not finite)    SAM's gradient      yes
the method's gradient overflows the params' dtype      SAM's, else g       yes
one of the penalty's terms is not defined              the rest (by rule)  yes
=====================================================  ==================  =======

A step is counted once, whatever it meets. Guards choose, they never blend: a NaN in what is not chosen does no harm.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from crsam_jax.step import trees
from crsam_jax.step.rule import Outcome, Step
from crsam_jax.step.types import Params
from crsam_jax.step.vectors import Vector, where


def are_valid(numbers: Mapping[str, jax.Array]) -> jax.Array:
    """Whether all of the numbers are finite and not negative, as they are checked to be where they are constants."""
    return jnp.all(jnp.stack([jnp.isfinite(value) & (value >= 0) for value in numbers.values()]))


def settled(step: Step, outcome: Outcome, largest: float) -> tuple[Vector, jax.Array, jax.Array]:
    """The combination to return, whether the step is guarded, and whether it is bounded.

    Args:
      step: what was seen.
      outcome: what the rule made of it.
      largest: the largest number that surely survives the cast to the params' dtypes.
    """
    here = step.here.grad
    instead = here if outcome.instead is None else outcome.instead
    is_plus_finite = jnp.isfinite(step.plus.loss) & jnp.isfinite(step.products.norm(step.plus.grad))
    is_whole = jnp.asarray(outcome.is_defined) & (step.products.largest(outcome.gradient) <= largest)
    is_instead_finite = step.products.largest(instead) <= largest
    chosen = where(is_whole, outcome.gradient, where(is_instead_finite, instead, here))
    gradient = where(step.is_perturbed & is_plus_finite, chosen, here)
    is_method = step.is_perturbed & is_plus_finite & is_whole
    is_guarded = step.is_perturbed & ~(is_method & ~jnp.asarray(outcome.is_guarded))
    return gradient, is_guarded, is_method & outcome.is_bounded


def largest_of(tree: Params) -> float:
    """The largest number that survives the cast to each of the tree's dtypes, whatever the rounding.

    float16 is left to :func:`checked`: its range is so narrow that a bound by norms would stop gradients that fit.
    """
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)} - {jnp.dtype(jnp.float16)}
    return min((float(jnp.finfo(dtype).max) for dtype in dtypes), default=math.inf) * (1 - 2**-8)


def checked(gradient: Params, grads: Params) -> tuple[Params, jax.Array]:
    """The gradient, or g where its cast to float16 overflowed; and whether it did. Of other dtypes nothing is read."""
    narrow = [leaf for leaf in jax.tree.leaves(gradient) if leaf.dtype == jnp.float16]
    if not narrow:
        return gradient, jnp.zeros((), bool)
    has_overflown = ~trees.all_finite(narrow)
    return trees.select(has_overflown, grads, gradient), has_overflown
