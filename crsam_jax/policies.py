"""When to pay: wrappers that take the full method only at some steps.

Each policy wraps a member of the family, or another policy, and stands first in the chain in its place. On the steps
between, the gradient passes through (or is corrected by what an earlier step found), nothing is evaluated, and the
member's own state and diagnostics keep the values of its latest full step.

The choice is a ``lax.cond`` inside the jitted step, so the work skipped is really skipped; under ``vmap`` a
conditional becomes a selection and both branches run. On CPU, XLA takes convolutions inside a conditional off its
fast path, and a full step can take twenty times as long (``python -m experiments benchmark --conditional`` in the
repository measures it). There, choose on the host between two jitted steps: pass ``full_step=True`` or ``False``, a
Python bool that is static under jit, to ``update``; :func:`is_full_step` computes it from the optimizer's state and
the gradient. A schedule of ρ inside a policy counts full steps only.

Around a member with ``sync_perturbation=False`` the gradient that passes through is that of one part of the batch:
average the policy's result over the axis, which leaves full steps as they are. ``adaptive_policy`` does not go with
it, since all parts must come to one decision.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class PeriodicState(NamedTuple):
    """State of :func:`periodic`: int32 scalars, and the state of the wrapped transformation.

    Attributes:
      steps: steps so far.
      full_steps: how many of them were full.
      period: k.
      inner_state: of the wrapped transformation.
    """

    steps: jax.Array
    full_steps: jax.Array
    period: jax.Array
    inner_state: Any

    def is_due(self, grads: Any) -> jax.Array:
        """Whether the next step is full; the gradient does not matter."""
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
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> PeriodicState:
        return PeriodicState(
            jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.asarray(k, jnp.int32), inner.init(params)
        )

    def update(
        updates: Any, state: PeriodicState, params: Any = None, *, full_step: bool | None = None, **extra_args: Any
    ) -> tuple[Any, PeriodicState]:
        due = state.is_due(updates) if full_step is None else full_step
        result, inner_state = run(inner, due, updates, state.inner_state, params, extra_args)
        return result, PeriodicState(
            steps=optax.safe_increment(state.steps),
            full_steps=state.full_steps + jnp.asarray(due, jnp.int32),
            period=state.period,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


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


def run(
    inner: optax.GradientTransformationExtraArgs,
    due: bool | jax.Array,
    grads: Any,
    inner_state: Any,
    params: Any,
    extra_args: Any,
) -> tuple[Any, Any]:
    """The wrapped transformation if the step is due, else the gradient as it is; and the new inner state."""

    def full() -> tuple[Any, Any]:
        return inner.update(grads, inner_state, params, **extra_args)

    return choose(due, full, lambda: (grads, inner_state))


def choose(due: bool | jax.Array, full: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """Runs one of two branches: at once for a bool, inside the compiled program for a traced one."""
    if isinstance(due, bool):
        return full() if due else otherwise()
    return jax.lax.cond(due, full, otherwise)


def check_period(k: int) -> None:
    """Checks that k is an integer ≥ 1."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
