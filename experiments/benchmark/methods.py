"""What is compared: optax's SAM, this library's, and CR-SAM in each strategy, around the same base optimizer."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax

import crsam_jax
from experiments.benchmark.problem import LossFn

Strategy = Literal["auto", "sequential", "ordered", "vmap"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class Method(NamedTuple):
    """An optimizer, at how many points it evaluates the gradient: its floor, and whether they share the devices out."""

    name: str
    tx: optax.GradientTransformationExtraArgs
    points: int
    has_probe_axis: bool = False


def methods(loss_fn: LossFn, base: optax.GradientTransformation) -> list[Method]:
    """The sharpness-aware methods, each with ``base`` for its last link."""
    members = {
        "sam": (crsam_jax.sam(loss_fn, has_aux=True), 2),
        **{f"crsam, {strategy}": (_crsam(loss_fn, strategy), 3) for strategy in STRATEGIES},
    }
    chains = [Method(name, optax.chain(member, base), points) for name, (member, points) in members.items()]
    return [Method("optax.contrib.sam", optax_sam(loss_fn, base), 2), *chains]


def with_probe_axis(loss_fn: LossFn, base: optax.GradientTransformation) -> Method:
    """CR-SAM whose probes are each evaluated by half of the devices, those at one place of the axis ``"probe"``."""
    crsam = crsam_jax.crsam(loss_fn, execution=crsam_jax.Execution(probe_axis="probe"), has_aux=True)
    return Method("crsam, probe axis", optax.chain(crsam, base), 3, True)


def optax_sam(loss_fn: LossFn, base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The SAM of optax in opaque mode, called as the members are, for the same ρ as :func:`crsam_jax.sam`'s default."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    sam = optax.contrib.sam(base, adversary, opaque_mode=True)

    def update(updates: Any, state: Any, params: Any = None, *, loss: Any, **inputs: Any) -> tuple[Any, Any]:
        gradient = lambda params, _: jax.grad(loss_fn, has_aux=True)(params, **inputs)[0]
        return sam.update(updates, state, params, grad_fn=gradient)

    return optax.GradientTransformationExtraArgs(sam.init, update)


def _crsam(loss_fn: LossFn, strategy: Strategy) -> optax.GradientTransformationExtraArgs:
    return crsam_jax.crsam(loss_fn, execution=crsam_jax.Execution(strategy), has_aux=True)


def make_step(
    loss_fn: LossFn, tx: optax.GradientTransformation
) -> Callable[[Any, Any, Any, Any], tuple[Any, Any, Any, jax.Array]]:
    """From params, model state, optimizer state and a batch to updates, the next states, and the loss."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, model_state: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any, jax.Array]:
        inputs = {"model_state": model_state, **batch}
        (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, **inputs)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss, **inputs)
        return updates, model_state, opt_state, loss

    return step
