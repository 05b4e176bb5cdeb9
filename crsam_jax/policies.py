"""When to pay: wrappers that take the full method only at some steps.

Each policy wraps a method, or another policy, and comes first in the chain in its place. On the steps
between, the gradient passes through (or is corrected by what an earlier step found), nothing is evaluated, and the
method's own state and diagnostics keep the values of its latest full step.

The choice is a ``lax.cond`` inside the jitted step, so the work skipped is really skipped; under ``vmap`` a
conditional becomes a selection and both branches run. On CPU the branch is brought into the form in which XLA's
convolutions are fast (:func:`crsam_jax.canonical_convolutions`). For two programs instead of a conditional pass
``full_step=True`` or ``False``, a Python bool that is static under jit, to ``update``;
:func:`crsam_jax.is_full_step` computes it from the optimizer's state and the gradient. A schedule of ρ inside a policy
counts full steps only.

Around a method with ``ascent_only=True`` the gradient that passes through must be the whole batch's: choose
``full_step=`` on the host, and take the gradient of a part only for full steps. :func:`crsam_jax.look` and
:func:`crsam_jax.adaptive_policy` read the gradient and refuse such a method.

Around a method with ``sync_perturbation=False`` the gradient that passes through belongs to one part of the batch:
average the policy's result over the axis, which leaves full steps as they are. ``adaptive_policy`` does not go with
it, since all parts must come to one decision.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _trees as trees
from crsam_jax._checks import check_number, whole_number
from crsam_jax._convolutions import canonical_convolutions
from crsam_jax._trees import Params
from crsam_jax.diagnostics import AscentOnlyDiagnostics
from crsam_jax.engine import value_at

__all__ = [
    "AdaptivePolicyState",
    "LateState",
    "LookState",
    "PeriodicState",
    "adaptive_policy",
    "is_full_step",
    "late",
    "look",
    "periodic",
]

# The sums behind the projection lose about this many units in the last place.
_PROJECTION_ULPS = 16


def policy(
    tx: optax.GradientTransformation,
    start: Callable[[Params, Any], Any],
    *,
    between: Callable[[Any, Params], Params] = lambda state, grads: grads,
    remember: Callable[[Any, Params, Params], Any] = lambda state, result, grads: state,
    advance: Callable[[Any, Params], Any] = lambda state, grads: state,
) -> optax.GradientTransformationExtraArgs:
    """What all policies share: counting, the choice, and the method's state.

    The state is a NamedTuple with the fields ``steps``, ``full_steps`` and ``inner_state``, whatever else it holds, and
    the method ``is_due(grads)``: whether the step with this gradient is full.

    Args:
      tx: a method, or another policy.
      start: ``(params, inner_state) -> state``.
      between: ``(state, grads) -> gradient`` of a step that is not full.
      remember: ``(state, result, grads) -> state`` after a full step.
      advance: ``(state, grads) -> state`` after every step, when it is counted.

    Raises:
      TypeError: if ``tx`` is no transformation.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"A policy wraps a method, such as crsam_jax.sam(loss_fn); got {tx!r}. "
            "Write periodic(sam(loss_fn), 2), not periodic(loss_fn, 2)."
        )
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> Any:
        return start(params, inner.init(params))

    def update(
        updates: Params, state: Any, params: Params = None, *, full_step: Any = None, **extra_args: Any
    ) -> tuple[Params, Any]:
        def full() -> tuple[Params, Any]:
            result, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
            return result, remember(state, result, updates)._replace(inner_state=inner_state)

        due = state.is_due(updates) if full_step is None else full_step
        result, new_state = _choose(due, full, lambda: (between(state, updates), state))
        new_state = new_state._replace(
            steps=optax.safe_increment(state.steps), full_steps=state.full_steps + jnp.asarray(due, jnp.int32)
        )
        return result, advance(new_state, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def counters() -> tuple[jax.Array, jax.Array]:
    """``steps`` and ``full_steps`` before the first step."""
    return jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)


def check_reads_gradient(name: str, inner_state: Any) -> None:
    """Checks that a policy that reads g is not put around a method whose g may come from a part of the batch.

    Raises:
      ValueError: if it is.
    """

    def is_ascent_only(node: Any) -> bool:
        return isinstance(node, AscentOnlyDiagnostics)

    if any(map(is_ascent_only, jax.tree.leaves(inner_state, is_leaf=is_ascent_only))):
        raise ValueError(
            f"{name} reads the gradient of every step, which with ascent_only=True may come from a part of the batch. "
            "Leave ascent_only out, or take periodic or late with full_step= chosen by the loop."
        )


def is_full_step(opt_state: Any, grads: Any) -> jax.Array:
    """Whether the policy in ``opt_state`` takes its full step for this gradient.

    For choosing on the host between two jitted steps, see the module's description:
    ``step(..., full_step=bool(is_full_step(opt_state, grads)))`` with ``full_step`` static.

    Args:
      opt_state: an optimizer state with one policy in it.
      grads: the gradient that ``update`` is about to get. A periodic policy does not look at it.

    Returns:
      A boolean scalar.

    Raises:
      ValueError: if there is no policy, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, crsam_jax
      >>> tx = optax.chain(crsam_jax.periodic(crsam_jax.sam(jnp.sum), k=2), optax.sgd(0.1))
      >>> w = jnp.ones(2)
      >>> print(crsam_jax.is_full_step(tx.init(w), w))
      True
    """

    def is_policy(node: Any) -> bool:
        return hasattr(node, "is_due")

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_policy) if is_policy(node)]
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one policy (periodic, look or adaptive_policy), found {len(found)}.")
    return found[0].is_due(grads)


def _choose(due: bool | jax.Array, full: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """Runs one of two branches: at once for a bool, inside the compiled program for a traced one."""
    if isinstance(due, bool):
        return full() if due else otherwise()
    return jax.lax.cond(due, canonical_convolutions(full), otherwise)


class PeriodicState(NamedTuple):
    """State of :func:`crsam_jax.periodic`: int32 scalars, and the state of the wrapped transformation.

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

    A step costs 1 + (n−1)/k evaluations on average; the full method costs n.

    Args:
      tx: a method.
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
      which calls this SAM-k and improves it by :func:`crsam_jax.look`.
    """
    whole_number("k", k, at_least=1)

    def start(params: Params, inner_state: Any) -> PeriodicState:
        del params
        return PeriodicState(*counters(), jnp.asarray(k, jnp.int32), inner_state)

    return policy(tx, start)


class LateState(NamedTuple):
    """State of :func:`crsam_jax.late`.

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

    With s of T steps before the first full one a step costs 1 + (n−1)(1 − s/T) evaluations on average;
    the full method costs n: SAM in the last eighth of training costs 1.125.

    Args:
      tx: a method, or another policy.
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
        whole_number("start", start, at_least=0)
        return int(start)
    whole_number("total_steps", total_steps, at_least=1)
    check_number("start", start)
    check_number("1 - start", 1 - start)
    return round(start * total_steps)


class LookState(NamedTuple):
    """State of :func:`crsam_jax.look`.

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
      tx: a method; the paper's is :func:`crsam_jax.sam`.
      k: the period, an integer ≥ 1. k = 1 is ``tx`` itself.
      strength: the paper's α ≥ 0, a number.

    Returns:
      A transformation that also takes ``full_step`` at ``update``, see :func:`crsam_jax.periodic`.

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
    whole_number("k", k, at_least=1)
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
    """The relative rounding error of the result in its own dtypes plus the projection's in a wide one."""
    own = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(result)), default=0.0)
    return own + _PROJECTION_ULPS * float(jnp.finfo(trees.wide_dtype(result)).eps)


class AdaptivePolicyState(NamedTuple):
    """State of :func:`crsam_jax.adaptive_policy`.

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
    tx: optax.GradientTransformation, threshold: optax.ScalarOrSchedule = 0.0, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """AE-SAM's rule: a full step where ‖g‖² is large for its running mean and variance, else the plain gradient.

    With s = ‖g‖², μ ← d μ + (1−d) s, then σ² ← d σ² + (1−d) (s−μ)²; the step is full if s ≥ μ + c σ. μ and σ²
    begin at 0, so that the first steps are full. A gradient that is not finite passes through and leaves μ and σ² as
    they are.

    Args:
      tx: a method.
      threshold: c, a number or schedule of any sign. The paper lets it fall linearly over training:
        ``optax.linear_schedule(1.0, -1.0, total_steps)``.
      decay: d in [0, 1).

    Returns:
      A transformation that also takes ``full_step`` at ``update``, see :func:`crsam_jax.periodic`. Its state has the
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
