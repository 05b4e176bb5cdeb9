"""Where to look: from the gradient g at w to the direction v of the perturbation ρv.

An ascent is a pair of pure functions, so it may carry a state and travel through ``optax.inject_hyperparams`` without
being taken for a schedule. Random directions depend on a seed and the step count alone: a run can be repeated and
resumed, and all devices of a mesh draw the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from crsam_jax import _trees as trees
from crsam_jax._checks import check_number, check_seed, whole_number
from crsam_jax._trees import Params, kind_of

__all__ = [
    "Ascent",
    "PreconditionedState",
    "SparseState",
    "adaptive_ascent",
    "dropped_ascent",
    "dynamic_sparse_ascent",
    "friendly_ascent",
    "gradient_ascent",
    "largest_fraction",
    "masked_ascent",
    "momentum_ascent",
    "preconditioned_ascent",
    "random_weight_ascent",
    "smoothed_ascent",
    "sparse_ascent",
    "variance_suppressed_ascent",
]

GradientFn: TypeAlias = Callable[[Params], Params]
"""From a point, a tree like params, to the gradient of the loss there."""

Mask: TypeAlias = Any
"""A pytree of bools that is a prefix of params, or a function from params to one."""


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
      >>> sign_ascent = crsam_jax.ascents.Ascent(init=lambda params: (), apply=apply)
      >>> tx = crsam_jax.sam(lambda w: jnp.sum(w**4), ascent=sign_ascent)
    """

    init: Callable[[Any], Any]
    apply: Callable[..., tuple[Any, Any]]


def check_mask(name: str, mask: Mask | None) -> None:
    """Checks a mask at construction.

    Raises:
      TypeError: for a bare bool, which says nothing about leaves.
    """
    if isinstance(mask, (bool, np.bool_)) or (isinstance(mask, jax.Array) and mask.ndim == 0):
        raise TypeError(
            f"{name} must be a tree with True or False for each part of params, or a function from params to one; got "
            f"{mask!r}. Leave it out to choose everything. Under optax.inject_hyperparams a function is called as a "
            f"schedule unless it is named as static: static_args=('loss_fn', {name!r})."
        )


def broadcast_mask(name: str, mask: Mask, params: Any) -> Any:
    """The mask as a tree of bools with the structure of params."""
    leaves = jax.tree.leaves(mask)
    is_tree = bool(leaves) and all(isinstance(leaf, bool) for leaf in leaves)  # an Equinox module of bools is callable
    mask = mask(params) if callable(mask) and not is_tree else mask
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
                f"{jax.tree_util.keystr(path) or 'the root'}. It chooses whole leaves by True and False; "
                "sparse_ascent chooses single elements."
            )
    return full


def perturbed_part(mask: Mask | None, params: Any) -> Any:
    """Which leaves are perturbed, as a tree of bools.

    Raises:
      ValueError: if the mask leaves nothing to perturb.
    """
    which = broadcast_mask("mask", True if mask is None else mask, params)
    if jax.tree.leaves(which) and not any(jax.tree.leaves(which)):
        raise ValueError(
            "mask is False for all params, so that nothing is perturbed. Under optax.inject_hyperparams a function is "
            "called as a schedule unless it is named as static: static_args=('loss_fn', 'mask')."
        )
    return which


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
"""A step special-cases v = g/‖g‖, which needs no extra tree or products."""


def gradient_ascent() -> Ascent:
    """The direction of SAM and of CR-SAM: v = g/‖g‖, one norm over the whole tree.

    Where ‖g‖ is zero or g is not finite, v is zero.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> direction, _ = crsam_jax.ascents.gradient_ascent().apply(grads, (), grads)
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
      >>> ascent = crsam_jax.ascents.masked_ascent(crsam_jax.ascents.gradient_ascent(), {"w": True, "b": False})
      >>> direction, _ = ascent.apply(grads, (), grads)
      >>> print(direction["w"], direction["b"])
      [1.] [0.]

    References:
      Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization Needs", NeurIPS 2023:
      perturbing the normalization layers alone.
    """
    check_mask("mask", mask)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        which = perturbed_part(mask, params)

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
            f"ascent must be an Ascent, such as crsam_jax.ascents.adaptive_ascent(), or None; got {ascent!r}"
            + (" (call it to make one)." if callable(ascent) else ".")
        )
    return ascent


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
      >>> direction, _ = crsam_jax.ascents.adaptive_ascent(eta=0.0).apply(grads, (), params)
      >>> print(direction * 5**0.5)  # T²g = [1, 4] over ‖Tg‖ = √5
      [1. 4.]

    References:
      Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks", ICML 2021, eq. 7 and algorithm 1.
    """
    check_number("eta", eta)
    check_mask("adaptive", adaptive)

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


def smoothed_ascent(sigma: float = 0.05, weight: float = 1.0, seed: int = 0) -> Ascent:
    """R-SAM's direction: v = (Δ + λ ∇L(w+Δ))/‖Δ + λ ∇L(w+Δ)‖ with Gaussian noise Δ, for one more evaluation.

    Δ is drawn filter by filter: within a filter (a slice along the last axis; a leaf of one axis or none is one
    filter) the elements are independent with variance σ²‖filter‖²/n, n their number, so that E‖Δ‖² = σ²‖w‖².

    Args:
      sigma: σ ≥ 0, size of the noise relative to the weights. σ = 0 is :func:`gradient_ascent`.
      weight: λ > 0, weight of the gradient against the noise.
      seed: an integer.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.smoothed_ascent(sigma=0.1)
      >>> w = jnp.array([3.0, 4.0])
      >>> direction, state = ascent.apply(w, ascent.init(w), w, lambda point: point)
      >>> print(jnp.linalg.norm(direction))
      1.0

    References:
      Liu et al., "Random Sharpness-Aware Minimization", NeurIPS 2022. Verified from its abstract: the loss is
      smoothed by a random perturbation and the ascent step is taken from there. Only the abstract was
      available: that the noise stays in the perturbation, the role of λ and the noise's scale are this library's
      choice.
    """
    check_number("sigma", sigma)
    check_number("weight", weight)
    check_seed(seed)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn) -> tuple[Any, Any]:
        del grads
        noise = filter_noise(sigma, step_key(seed, state), params)
        smoothed = jax.tree.map(lambda w, delta: (w + delta).astype(jnp.result_type(w)), params, noise)
        combined = trees.wide_map(lambda delta, g: delta + weight * g, noise, gradient_fn(smoothed))
        return trees.unit(combined), optax.safe_increment(state)

    return Ascent(_count, apply)


def random_weight_ascent(sigma: float = 0.01, seed: int = 0) -> Ascent:
    """Random weight perturbation: v = Δ, Gaussian noise drawn filter by filter; the gradient is not looked at.

    Δ is the noise of :func:`smoothed_ascent`. ‖v‖ is about σ‖w‖: use it with ρ = 1.

    Args:
      sigma: σ ≥ 0, size of the noise relative to the weights.
      seed: an integer.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.random_weight_ascent(sigma=0.1)
      >>> w = jnp.ones(10_000)
      >>> direction, _ = ascent.apply(w, ascent.init(w), w)
      >>> print(round(float(jnp.linalg.norm(direction) / jnp.linalg.norm(w)), 2))
      0.1

    References:
      Li et al., "Revisiting Random Weight Perturbation for Efficiently Improving Generalization", TMLR 2024, arXiv
      2404.00357.
    """
    check_number("sigma", sigma)
    check_seed(seed)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del grads, gradient_fn
        return filter_noise(sigma, step_key(seed, state), params), optax.safe_increment(state)

    return Ascent(_count, apply)


def filter_noise(sigma: float, key: jax.Array, params: Params) -> Params:
    """Gaussian noise with E‖Δ‖² = σ²‖w‖² in each filter, in at least float32."""
    noise = jax.tree.map(_relative_to_filters, normal_like(key, params), params)
    return jax.tree.map(lambda leaf: sigma * leaf, noise)


def dropped_ascent(keep: float = 0.5, seed: int = 0) -> Ascent:
    """ESAM's stochastic weight perturbation: v = (g ⊙ m)/(β‖g ⊙ m‖), each element kept with probability β.

    ‖v‖ is 1/β. Which elements are kept is drawn anew in every step. That saves no work here: an
    evaluation covers all params.

    Args:
      keep: β in (0, 1]. β = 1 is :func:`gradient_ascent`.
      seed: an integer.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.dropped_ascent(keep=0.5)
      >>> g = jnp.ones(1000)
      >>> direction, _ = ascent.apply(g, ascent.init(g), g)
      >>> print(jnp.linalg.norm(direction), bool(abs(jnp.mean(direction == 0) - 0.5) < 0.1))
      2.0 True

    References:
      Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
      arXiv 2110.03141. The authors' code drops whole tensors instead of elements.
    """
    check_number("1 - keep", 1 - keep, below=1)
    check_seed(seed)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        uniform = uniform_like(step_key(seed, state), grads)
        kept = jax.tree.map(lambda g, u: jnp.where(u < keep, g, 0), grads, uniform)
        return jax.tree.map(lambda leaf: leaf / keep, trees.unit(kept)), optax.safe_increment(state)

    return Ascent(_count, apply)


def step_key(seed: int, count: jax.Array) -> jax.Array:
    """The key of a step, a function of the seed and of the number of steps before it."""
    return jax.random.fold_in(jax.random.key(seed), count)


def normal_like(key: jax.Array, params: Any) -> Any:
    """Independent standard normal numbers in the shapes of params, in at least float32."""
    return optax.tree.random_like(key, trees.widen(params), jax.random.normal)


def uniform_like(key: jax.Array, params: Any) -> Any:
    """Independent uniform numbers in [0, 1) in the shapes of params, in float32."""
    return optax.tree.random_like(key, params, jax.random.uniform, dtype=jnp.float32)


def _relative_to_filters(noise: jax.Array, param: jax.Array) -> jax.Array:
    axes = tuple(range(param.ndim - 1)) if param.ndim > 1 else None
    wide = param.astype(noise.dtype)
    return noise * jnp.sqrt(jnp.mean(wide**2, axis=axes, keepdims=True))


def _count(params: Any) -> jax.Array:
    del params
    return jnp.zeros((), jnp.int32)


def momentum_ascent(decay: float = 0.9) -> Ascent:
    """Momentum-SAM's direction: v = −b/‖b‖ with b ← μ b + g, the momentum buffer before this step.

    The minus sign is the paper's: it perturbs along the step that momentum takes, as Nesterov's method does. The
    first step has no buffer and is not perturbed. Here b collects the gradients at w that the transformation is
    fed with, so that a step costs two evaluations. The paper collects the gradients at the perturbed point, which
    costs one: that is :func:`crsam_jax.msam`, the method to take for Momentum-SAM itself. This ascent is for
    combinations with other methods, ``crsam(loss_fn, ascent=momentum_ascent())`` for one.

    Args:
      decay: μ in [0, 1), the momentum's.

    Raises:
      TypeError, ValueError: if decay is not a number in [0, 1).

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.momentum_ascent(decay=0.5)
      >>> g = jnp.array([3.0, 4.0])
      >>> direction, state = ascent.apply(g, ascent.init(g), g)
      >>> print(direction)
      [0. 0.]
      >>> direction, state = ascent.apply(g, state, g)
      >>> print(direction)
      [-0.6 -0.8]

    References:
      Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead",
      arXiv 2401.12033, algorithm 1.
    """
    check_number("decay", decay, below=1)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        direction = jax.tree.map(jnp.negative, trees.unit(state))
        return direction, _updated(state, lambda b, g: decay * b + g, grads)

    return Ascent(_zeros, apply)


def friendly_ascent(sigma: float = 1.0, decay: float = 0.9) -> Ascent:
    """Friendly SAM's direction: v = d/‖d‖ with d = g − σ m, m the running mean of the gradients before this one.

    m ← λ m + (1−λ) g, and m = g after the first gradient that is not zero. Taking out the running mean leaves the
    noise of the batch. In the first step d = g.

    Args:
      sigma: σ ≥ 0. σ = 0 is :func:`gradient_ascent`.
      decay: λ in [0, 1).

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.friendly_ascent(sigma=1.0, decay=0.5)
      >>> _, state = ascent.apply(jnp.array([2.0, 0.0]), ascent.init(jnp.zeros(2)), None)
      >>> direction, _ = ascent.apply(jnp.array([1.0, 3.0]), state, None)
      >>> print(direction * 10**0.5)  # [1, 3] − [2, 0]
      [-1.  3.]

    References:
      Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024, arXiv 2403.12350, algorithm 1, with the start
      m = g of the authors' code.
    """
    check_number("sigma", sigma)
    check_number("decay", decay, below=1)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        difference = trees.wide_map(lambda g, m: g - sigma * m, grads, state)
        is_first = trees.norm(state) == 0

        def mean(m: jax.Array, g: jax.Array) -> jax.Array:
            return jnp.where(is_first, g, decay * m + (1 - decay) * g)

        return trees.unit(difference), _updated(state, mean, grads)

    return Ascent(_zeros, apply)


def variance_suppressed_ascent(theta: float = 0.4) -> Ascent:
    """VaSSO's direction: v = d/‖d‖ with the running mean d ← (1−θ) d + θ g, from d = 0.

    Args:
      theta: θ in (0, 1]. θ = 1 is :func:`gradient_ascent`.

    Raises:
      TypeError, ValueError: if theta is not a number in (0, 1].

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.variance_suppressed_ascent(theta=0.5)
      >>> _, state = ascent.apply(jnp.array([8.0, 0.0]), ascent.init(jnp.zeros(2)), None)
      >>> direction, _ = ascent.apply(jnp.array([2.0, 8.0]), state, None)
      >>> print(direction)  # of ½ [4, 0] + ½ [2, 8] = [3, 4]
      [0.6 0.8]

    References:
      Li, Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance Suppression", NeurIPS 2023; arXiv
      2509.02433. The authors' code starts at d = g instead, which matters in the first few steps, and adds 1e-7 to ‖d‖.
    """
    check_number("1 - theta", 1 - theta, below=1)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        new = _updated(state, lambda d, g: (1 - theta) * d + theta * g, grads)
        return trees.unit(new), new

    return Ascent(_zeros, apply)


class PreconditionedState(NamedTuple):
    """State of :func:`preconditioned_ascent`: how many, and the running mean of g², a tree like params."""

    ascent_steps: jax.Array
    second_moment: Any


def preconditioned_ascent(decay: float = 0.999, epsilon: float = 1e-8) -> Ascent:
    """The direction of Adam's metric: v = p/‖p‖ with p = g/(√ν̂ + ε), ν ← β ν + (1−β) g², ν̂ = ν/(1 − βᵗ).

    Args:
      decay: β in [0, 1), Adam's ``b2``.
      epsilon: ε > 0, Adam's ``eps``.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.preconditioned_ascent()
      >>> g = jnp.array([3.0, -0.01])
      >>> direction, _ = ascent.apply(g, ascent.init(g), g)
      >>> print(direction * 2**0.5)  # in the first step the sign of g
      [ 1. -1.]

    References:
      Singh et al., "Avoiding spurious sharpness minimization broadens applicability of SAM", ICML 2025, arXiv
      2502.02407: preconditioned SAM, for language models.
    """
    check_number("decay", decay, below=1)
    check_number("epsilon", epsilon)

    def init(params: Any) -> PreconditionedState:
        return PreconditionedState(jnp.zeros((), jnp.int32), _zeros(params))

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        steps = optax.safe_increment(state.ascent_steps)
        moment = _updated(state.second_moment, lambda nu, g: decay * nu + (1 - decay) * g**2, grads)

        def scale(g: jax.Array, nu: jax.Array) -> jax.Array:
            return g / (trees.safe_sqrt(nu / (1 - decay ** steps.astype(nu.dtype))) + epsilon)

        return trees.unit(trees.wide_map(scale, grads, moment)), PreconditionedState(steps, moment)

    return Ascent(init, apply)


def _updated(state: Any, rule: Any, grads: Any) -> Any:
    """The state after a step; a gradient that is not finite leaves it as it is."""
    new = trees.cast_like(trees.wide_map(rule, state, grads), state)
    return trees.select(trees.all_finite(grads), new, state)


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(p, trees.wide_dtype(p)), params)


# Sparse ascents (SSAM): v = (g/‖g‖) ⊙ m with a binary mask m over all elements, not renormalized, so that ‖v‖ ≤ 1.
# The mask says which elements are worth perturbing; it saves no work here: an evaluation covers all params.


class SparseState(NamedTuple):
    """State of :func:`dynamic_sparse_ascent`: steps so far, and the mask, a tree of bool arrays like params."""

    steps: jax.Array
    mask: Any


def largest_fraction(scores: Any, fraction: float) -> Any:
    """The mask of the elements with the largest scores, over the whole tree.

    With the mean of squared gradients of single examples as scores this is the mask of SSAM-F (Fisher information).

    Args:
      scores: a tree of real arrays.
      fraction: share of the elements to keep, in [0, 1]; round(fraction · n) elements are kept, ties by position.

    Returns:
      A tree of bool arrays like ``scores``.

    Raises:
      TypeError, ValueError: if fraction is not a number in [0, 1].

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> print(crsam_jax.ascents.largest_fraction({"a": jnp.array([1.0, 5.0]), "b": jnp.array([3.0, 2.0])}, 0.5)["b"])
      [ True False]
    """
    check_number("1 - fraction", 1 - fraction)
    check_number("fraction", fraction)
    leaves, structure = jax.tree.flatten(scores)
    sizes = [leaf.size for leaf in leaves]
    return _unflatten(_top(_flatten(leaves), round(fraction * sum(sizes))), leaves, structure)


def sparse_ascent(mask: Any) -> Ascent:
    """SSAM with a fixed mask: v = (g/‖g‖) ⊙ m.

    Args:
      mask: a tree of bool arrays like params; see :func:`largest_fraction`.

    Raises:
      TypeError: if a leaf of the mask is not a bool array.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> g = jnp.array([3.0, 4.0])
      >>> direction, _ = crsam_jax.ascents.sparse_ascent(jnp.array([True, False])).apply(g, (), g)
      >>> print(direction)
      [0.6 0. ]

    References:
      Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach", NeurIPS 2022,
      arXiv 2210.05177, algorithm 1. The paper refreshes the mask of SSAM-F every few epochs: build the ascent anew.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not hasattr(leaf, "dtype") or leaf.dtype != jnp.bool_:
            where = jax.tree_util.keystr(path) or "the root"
            raise TypeError(f"mask must have bool arrays at its leaves, found {kind_of(leaf)} at {where}.")

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        return _masked(trees.unit(grads), mask), state

    return Ascent(lambda params: (), apply)


def dynamic_sparse_ascent(
    sparsity: float = 0.5, drop: float = 0.5, update_every: int = 100, total_steps: int = 10_000, seed: int = 0
) -> Ascent:
    """SSAM-D: a random mask that, every so often, drops the elements with the smallest abs(g) and regrows others.

    At update step t the share drop · (1 + cos(πt/T))/2 of the kept elements is dropped, and as many of the others are
    taken in at random. One sort over all elements per update step.

    Args:
      sparsity: share of the elements that are not perturbed, in [0, 1).
      drop: share that is exchanged at the first update, in [0, 1].
      update_every: steps between updates of the mask, ≥ 1.
      total_steps: T, when the exchange has faded out.
      seed: an integer.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.ascents.dynamic_sparse_ascent(sparsity=0.75, update_every=1)
      >>> g = jnp.arange(1.0, 9.0)
      >>> state = ascent.init(g)
      >>> for _ in range(3):
      ...   direction, state = ascent.apply(g, state, g)
      ...   print(jnp.sum(direction != 0))
      2
      2
      2

    References:
      Mi et al., NeurIPS 2022, arXiv 2210.05177, algorithm 3, with drop by gradient and growth at random, the
      authors' default.
    """
    check_number("sparsity", sparsity, below=1)
    check_number("drop", drop)
    check_number("1 - drop", 1 - drop)
    whole_number("update_every", update_every, at_least=1)
    whole_number("total_steps", total_steps, at_least=1)
    check_seed(seed)

    def init(params: Any) -> SparseState:
        steps = jnp.zeros((), jnp.int32)
        return SparseState(steps, largest_fraction(uniform_like(step_key(seed, steps), params), 1 - sparsity))

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        direction = _masked(trees.unit(grads), state.mask)
        steps = state.steps + 1
        share = drop * (1 + jnp.cos(jnp.pi * jnp.minimum(steps / total_steps, 1))) / 2
        mask = jax.lax.cond(
            (steps % update_every == 0) & trees.all_finite(grads),
            lambda: _exchanged(state.mask, grads, uniform_like(step_key(seed, steps), grads), share),
            lambda: state.mask,
        )
        return direction, SparseState(steps, mask)

    return Ascent(init, apply)


def _exchanged(mask: Any, grads: Any, growth: Any, share: jax.Array) -> Any:
    """The mask, whose ``share`` with the smallest |g| gives way to elements with the largest ``growth``."""
    leaves, structure = jax.tree.flatten(mask)
    kept = _flatten(leaves, bool)
    number = jnp.floor(share * jnp.sum(kept).astype(share.dtype)).astype(jnp.int32)
    wide = trees.wide_dtype(grads)
    size = jnp.abs(_flatten([jnp.asarray(leaf, wide) for leaf in jax.tree.leaves(grads)]))
    dropped = _rank(jnp.where(kept, size, jnp.inf)) < jnp.minimum(number, jnp.sum(~kept))
    grown = _rank(jnp.where(kept, jnp.inf, -_flatten(jax.tree.leaves(growth)))) < jnp.sum(dropped)
    return _unflatten((kept & ~dropped) | grown, leaves, structure)


def _rank(values: jax.Array) -> jax.Array:
    """The place of each element in ascending order."""
    return jnp.argsort(jnp.argsort(values, stable=True))


def _top(values: jax.Array, number: int) -> jax.Array:
    return _rank(-values) < number


def _masked(direction: Any, mask: Any) -> Any:
    return jax.tree.map(lambda v, kept: jnp.where(kept, v, 0), direction, mask)


def _flatten(leaves: list[jax.Array], dtype: DTypeLike = jnp.float32) -> jax.Array:
    if not leaves:
        return jnp.zeros(0, dtype)
    return jnp.concatenate([jnp.ravel(_gathered(leaf)) for leaf in leaves])


def _gathered(leaf: jax.Array) -> jax.Array:
    """The leaf on every device if explicit mesh axes divide it: the order of all elements needs all of them."""
    return jax.sharding.reshard(leaf, jax.sharding.PartitionSpec()) if trees.is_sharded(leaf) else leaf


def _unflatten(flat: jax.Array, like: list[jax.Array], structure: Any) -> Any:
    parts, start = [], 0
    for leaf in like:
        part = flat[start : start + leaf.size].reshape(leaf.shape)
        if trees.is_sharded(leaf):
            kind: Any = jax.typeof(leaf)
            part = jax.sharding.reshard(part, kind.sharding)
        parts.append(part)
        start += leaf.size
    return jax.tree.unflatten(structure, parts)
