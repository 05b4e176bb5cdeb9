"""When to pay: wrappers that take the full method only at some steps.

Each policy wraps a member of the family, or another policy, and stands first in the chain in its place. On the steps
between, the gradient passes through (or is corrected by what an earlier step found), nothing is evaluated, and the
member's own state and diagnostics keep the values of its latest full step.

The choice is a ``lax.cond`` inside the jitted step, so the work skipped is really skipped; under ``vmap`` a
conditional becomes a selection and both branches run. On CPU the branch is brought into the form in which XLA's
convolutions are fast (:func:`crsam_jax.canonical_convolutions`). For two programs instead of a conditional pass
``full_step=True`` or ``False``, a Python bool that is static under jit, to ``update``; :func:`is_full_step` computes it
from the optimizer's state and the gradient. A schedule of ρ inside a policy counts full steps only.

Around a member with ``ascent_only=True`` the gradient that passes through must be that of the whole batch: choose
``full_step=`` on the host and take a part's gradient for full steps alone. :func:`look` and :func:`adaptive_policy`,
which read it, refuse such a member.

Around a member with ``sync_perturbation=False`` the gradient that passes through is that of one part of the batch:
average the policy's result over the axis, which leaves full steps as they are. ``adaptive_policy`` does not go with
it, since all parts must come to one decision.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crsam_jax.step.convolutions import canonical_convolutions
from crsam_jax.step.diagnostics import AscentOnlyDiagnostics
from crsam_jax.step.types import Params


def policy(
    tx: optax.GradientTransformation,
    start: Callable[[Params, Any], Any],
    *,
    between: Callable[[Any, Params], Params] = lambda state, grads: grads,
    remember: Callable[[Any, Params, Params], Any] = lambda state, result, grads: state,
    advance: Callable[[Any, Params], Any] = lambda state, grads: state,
) -> optax.GradientTransformationExtraArgs:
    """What all policies share: counting, the choice, and the member's state.

    The state is a NamedTuple with the fields ``steps``, ``full_steps`` and ``inner_state``, whatever else it holds, and
    the method ``is_due(grads)``: whether the step with this gradient is full.

    Args:
      tx: a member of the family, or another policy.
      start: ``(params, inner_state) -> state``.
      between: ``(state, grads) -> gradient`` of a step that is not full.
      remember: ``(state, result, grads) -> state`` after a full step.
      advance: ``(state, grads) -> state`` after every step, when it is counted.

    Raises:
      TypeError: if ``tx`` is no transformation.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"A policy wraps a member of the family, such as crsam_jax.sam(loss_fn); got {tx!r}. "
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
    """Checks that a policy that reads g is not put around a method whose g may be that of a part of the batch.

    Raises:
      ValueError: if it is.
    """

    def is_ascent_only(node: Any) -> bool:
        return isinstance(node, AscentOnlyDiagnostics)

    if any(map(is_ascent_only, jax.tree.leaves(inner_state, is_leaf=is_ascent_only))):
        raise ValueError(
            f"{name} reads the gradient of every step, which with ascent_only=True may be that of a part of the batch. "
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
