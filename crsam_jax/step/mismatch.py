r"""Whether the gradient and the losses of a step can belong to one function; of scalars that the step has anyway.

Let :math:`\varphi(t) = L(w + t\rho v)`, so that a step knows :math:`\varphi(0)`, :math:`\varphi(\pm 1)` and the
derivatives :math:`a_0 = \rho\langle v, g\rangle` and :math:`a_\pm = \rho\langle v, g^\pm\rangle`, all in units of the
loss. Every one of them is known twice over: the probes alone say what the incoming g and L must be.

**Two-sided, the gradient.** With :math:`d = (\varphi(1) - \varphi(-1))/2` and :math:`m = (a_+ + a_-)/2`, by Taylor

.. math::

  d = \varphi' + \tfrac{1}{6}\varphi''' + \tfrac{1}{120}\varphi^{(5)} + \dots, \qquad
  m = \varphi' + \tfrac{1}{2}\varphi''' + \tfrac{1}{24}\varphi^{(5)} + \dots,

hence :math:`(3d - m)/2 = \varphi' - \varphi^{(5)}/120 - \dots` is :math:`a_0` but for the fifth derivative (Simpson's
rule, solved for the middle), and :math:`|m - d| = |\varphi'''|/3` says how far from straight the loss is. The gradient
is mismatched if :math:`a_0` misses the prediction by more than a quarter of the larger of the two, plus
:math:`|m - d|`, plus the rounding noise of the losses.

**Two-sided, the loss.** :math:`(\varphi(1) + \varphi(-1))/2 - (a_+ - a_-)/4 = \varphi(0) - \varphi^{(4)}/24 - \dots`
does not involve g. The loss is mismatched if L misses it by more than a quarter of the larger of :math:`|a_\pm|`. Of a
quartic :math:`|a_\pm| = |\varphi^{(4)}|/6`, whose quarter is the term left out.

**One-sided.** By the trapezoid rule :math:`2(\varphi(1) - \varphi(0)) - a_+ = \varphi' - \varphi'''/6 - \dots` is
:math:`a_0` but for the third derivative, which one side cannot measure: mismatched if it is missed by more than a
quarter of the larger, plus a quarter of :math:`|a_+ - a_0| \approx |\varphi''|`, plus the noise. A wrong L and a wrong
g look alike here.

A quarter is wide: a step that is flagged is far off. Where ρ is so large that the loss has several turns between the
points, nothing at the probes says anything about g. From two sides that shows: g⁺ and g⁻ have little to do with each
other, whatever g is, and the step is not judged. From one side it looks like a gradient that is too large.
"""

import jax
import jax.numpy as jnp

from crsam_jax.step.rule import Point, Step
from crsam_jax.step.types import Params

SHARE = 0.25
"""What a number may miss its prediction by, relative to the larger of the two."""

ALIKE = 0.5
"""The least cosine between g⁺ and g⁻ with which the points are taken for neighbours."""


def is_one_sided_mismatch(step: Step) -> jax.Array:
    """Whether g or L is not that of the function seen at w + ρv."""
    here, plus = step.here.loss, step.plus.loss
    a, a_plus = _change(step, step.here), _change(step, step.plus)
    bend = SHARE * jnp.abs(a_plus - a)
    return _is_judged(step) & _misses(a, 2 * (plus - here) - a_plus, bend + step.loss_noise(2 * plus, 2 * here))


def is_two_sided_mismatch(step: Step) -> jax.Array:
    """Whether g or L is not that of the function seen at w + ρv and w − ρv."""
    here, plus, minus = step.here.loss, step.plus.loss, step.minus.loss
    a, a_plus, a_minus = (_change(step, point) for point in (step.here, step.plus, step.minus))
    noise = step.loss_noise(plus, here, minus)
    difference, mean = (plus - minus) / 2, (a_plus + a_minus) / 2
    is_gradient = _misses(a, (3 * difference - mean) / 2, jnp.abs(mean - difference) + noise)
    predicted = (plus + minus) / 2 - (a_plus - a_minus) / 4
    largest = jnp.maximum(jnp.abs(a_plus), jnp.abs(a_minus))
    is_loss = jnp.abs(here - predicted) > SHARE * largest + noise
    is_near = step.products.cosine(step.plus.grad, step.minus.grad) > ALIKE
    return _is_judged(step) & is_near & (is_gradient | is_loss)


def _change(step: Step, at: Point) -> jax.Array:
    """ρ⟨v, gradient⟩: by how much the loss would change over ρv along a straight line."""
    return step.rho * step.products.along(at.grad)


def _misses(found: jax.Array, predicted: jax.Array, tolerance: jax.Array) -> jax.Array:
    """False where anything is not finite: nothing is larger than infinity, and NaN compares with nothing."""
    largest = jnp.maximum(jnp.abs(found), jnp.abs(predicted))
    return jnp.abs(found - predicted) > SHARE * largest + tolerance


def _is_judged(step: Step) -> jax.Array:
    return step.is_perturbed & _moves_as_told(step.params)


def _moves_as_told(params: Params) -> bool:
    """Whether w + ρv is where it says: in half precision most of ρv is lost where it is added to w."""
    return all(jnp.finfo(jnp.result_type(leaf)).bits >= 32 for leaf in jax.tree.leaves(params))
