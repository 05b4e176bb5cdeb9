"""The experiments warn once if most steps of an epoch were mismatched."""

import jax
import jax.numpy as jnp
import optax
import pytest

from crsam_jax import crsam, periodic, sam
from experiments.training.loop import Watch


def loss_fn(params):
    return jnp.sum(jnp.cosh(params))


def train(tx, state, steps, wrong=0):
    """So many steps, the last of them with a gradient that is three times too long."""
    params = jnp.ones(3)
    for step in range(steps):
        grads = jax.grad(loss_fn)(params) * (3 if step >= steps - wrong else 1)
        state = jax.jit(tx.update)(grads, state, params)[1]
    return state


@pytest.mark.parametrize("method", [sam, crsam])
@pytest.mark.parametrize("is_periodic", [False, True])
def test_a_warning_comes_once_and_for_most_steps_of_an_epoch_alone(method, is_periodic):
    stage = method(loss_fn, rho=0.05)
    tx = optax.chain(periodic(stage, 2) if is_periodic else stage, optax.sgd(0.1))
    watch = Watch(tx.init(jnp.ones(3)))
    state = train(tx, tx.init(jnp.ones(3)), 8, wrong=4)
    assert watch.warning(state) is None  # half of them
    state = train(tx, state, 8, wrong=6)
    full = 4 if is_periodic else 8
    assert watch.warning(state).startswith(f"Warning: in {full * 6 // 8} of {full} steps the gradient did not fit")
    assert watch.warning(train(tx, state, 8, wrong=8)) is None


def test_what_cannot_tell_does_not_warn():
    for tx in (optax.with_extra_args_support(optax.sgd(0.1)), sam(loss_fn, ascent_only=True)):
        state = tx.init(jnp.ones(3))
        watch = Watch(state)
        assert watch.warning(train(tx, state, 4, wrong=4)) is None


def test_a_run_that_goes_on_counts_from_where_it_is():
    tx = crsam(loss_fn)
    state = train(tx, tx.init(jnp.ones(3)), 8, wrong=8)
    watch = Watch(state)
    assert watch.warning(train(tx, state, 4)) is None
