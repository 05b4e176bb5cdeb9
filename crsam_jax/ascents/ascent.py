"""Where to look: from the gradient g at w to the direction v of the perturbation ρv.

An ascent is a pair of pure functions, so that it may carry state and travel through
``optax.inject_hyperparams`` without being taken for a schedule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax.step import trees
from crsam_jax.step.checks import kind_of
from crsam_jax.step.types import GradientFn, Mask, Params


class Ascent(NamedTuple):
    """A rule for the direction v.

    Attributes:
      init: ``params -> state``, a pytree of arrays (``()`` for none).
      apply: ``(grads, state, params, gradient_fn) -> (direction, new_state)``. The direction has the structure
        and shapes of ``params`` and at least float32; zeros mean that there is no direction to look in. It is a
        constant for differentiation, as the perturbation of SAM is. ``gradient_fn(point)`` is the gradient of
        the loss at another point, one more evaluation.

    Example:
      The steepest ascent for the maximum norm, v = sign(g)/√n:

      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> def apply(grads, state, params, gradient_fn):
      ...   n = sum(g.size for g in jax.tree.leaves(grads))
      ...   return jax.tree.map(lambda g: jnp.sign(g) / n**0.5, grads), state
      >>> sign_ascent = crsam_jax.Ascent(init=lambda params: (), apply=apply)
      >>> tx = crsam_jax.sam(lambda w: jnp.sum(w**4), ascent=sign_ascent)
    """

    init: Callable[[Any], Any]
    apply: Callable[..., tuple[Any, Any]]


def broadcast_mask(name: str, mask: Mask, params: Any) -> Any:
    """The mask as a tree of bools with the structure of params."""
    mask = mask(params) if callable(mask) else mask
    try:
        full = jax.tree.broadcast(mask, params)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a prefix of params: {jax.tree.structure(mask)} does not fit {jax.tree.structure(params)}."
        ) from error
    for path, leaf in jax.tree_util.tree_leaves_with_path(full):
        if not isinstance(leaf, bool):
            raise TypeError(
                f"{name} must have True or False at its leaves, found {kind_of(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'the root'}. It chooses whole leaves; single elements are chosen by "
                "sparse_ascent."
            )
    return full


def no_state(params: Any) -> tuple[()]:
    """The initial state of an ascent that has none."""
    del params
    return ()


def _unit_gradient(
    grads: Params, state: Any, params: Params, gradient_fn: GradientFn | None = None
) -> tuple[Params, Any]:
    del params, gradient_fn
    return trees.unit(grads), state


GRADIENT_ASCENT = Ascent(no_state, _unit_gradient)
"""The one ascent that a step knows: its v is g/‖g‖, which takes no vector and no products of its own."""


def gradient_ascent() -> Ascent:
    """The direction of SAM and of CR-SAM: v = g/‖g‖, one norm over the whole tree.

    Where ‖g‖ is zero or g is not finite, v is zero.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> direction, _ = crsam_jax.gradient_ascent().apply(grads, (), grads)
      >>> print(direction["w"], direction["b"])
      [0.6] [0.8]

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
      eq. 2 with p = 2; Wu et al., "CR-SAM", AAAI 2024, algorithm 1, line 4.
    """
    return GRADIENT_ASCENT


def masked_ascent(ascent: Ascent, mask: Mask) -> Ascent:
    """The same ascent with gradient and direction set to zero outside ``mask``: only that part is perturbed.

    The norm of the gradient runs over the chosen part alone.

    Args:
      ascent: the ascent to restrict.
      mask: a prefix of params with bool leaves, or a function from params to one. True: perturbed.

    Raises:
      TypeError: at ``apply``, if a leaf of the mask is not a bool.
      ValueError: at ``apply``, if the mask is not a prefix of params.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> ascent = crsam_jax.masked_ascent(crsam_jax.gradient_ascent(), {"w": True, "b": False})
      >>> direction, _ = ascent.apply(grads, (), grads)
      >>> print(direction["w"], direction["b"])
      [1.] [0.]

    References:
      Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization Needs", NeurIPS 2023:
      perturbing the normalization layers alone.
    """

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        which = broadcast_mask("mask", mask, params)

        def chosen_gradient_fn(point: Any) -> Any:
            assert gradient_fn is not None
            inside = jax.tree.map(lambda moved, w, is_in: moved if is_in else w, point, params, which)
            return masked(gradient_fn(inside), which)

        direction, new_state = ascent.apply(masked(grads, which), state, params, chosen_gradient_fn)
        return masked(direction, which), new_state

    return Ascent(ascent.init, apply)


def masked(tree: Params, which: Any) -> Params:
    """The tree with zeros where the tree of bools ``which`` is false; see :func:`broadcast_mask`."""
    return jax.tree.map(lambda leaf, is_in: leaf if is_in else jnp.zeros_like(leaf), tree, which)


def checked_ascent(ascent: Ascent | None) -> Ascent:
    """The given ascent, or :func:`gradient_ascent` if there is none.

    Raises:
      TypeError: if what was given is not an Ascent.
    """
    if ascent is None:
        return GRADIENT_ASCENT
    if not isinstance(ascent, Ascent):
        raise TypeError(
            f"ascent must be an Ascent, such as crsam_jax.adaptive_ascent(), or None; got {ascent!r}"
            + (" (call it to make one)." if callable(ascent) else ".")
        )
    return ascent
