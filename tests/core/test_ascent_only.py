"""The ascent on a part of the batch: the gradient passed in gives v, and nothing else."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crsam_jax
from crsam_jax import adaptive_policy, asam, check_setup, look, periodic, rsam, sam
from tests.core.problems import broken_at, flat, mlp

LOSS_FN, PARAMS, BATCH = mlp(examples=32)
METHODS = {"sam": sam, "asam": asam, "rsam": rsam}


def part(k, batch=BATCH):
    return jax.tree.map(lambda x: x[::k], batch)


def step(tx, grads, params=PARAMS, batch=BATCH, **kwargs):
    gradient, state = tx.update(grads, tx.init(params), params, batch=batch, **kwargs)
    return gradient, state.diagnostics


@pytest.mark.parametrize("name", METHODS)
def test_with_the_whole_batchs_gradient_it_is_the_method_to_the_bit(name):
    grads = jax.grad(LOSS_FN)(PARAMS, BATCH)
    found, _ = step(METHODS[name](LOSS_FN, ascent_only=True), grads)
    expected, _ = step(METHODS[name](LOSS_FN), grads)
    np.testing.assert_array_equal(flat(found), flat(expected))


@pytest.mark.usefixtures("x64")
def test_it_is_the_whole_batchs_gradient_along_the_parts():
    loss_fn, params, batch = mlp(examples=32, dtype=jnp.float64)
    rho, grads = 0.3, jax.grad(loss_fn)(params, part(4, batch))
    v = jax.tree.map(lambda g: g / np.linalg.norm(flat(grads)), grads)
    at = jax.tree.map(lambda w, d: w + rho * d, params, v)
    loss, expected = jax.value_and_grad(loss_fn)(at, batch)
    found, seen = step(sam(loss_fn, rho, ascent_only=True), grads, params, batch)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    close(flat(found), flat(expected))
    close(seen.loss_plus, loss)
    close(seen.grad_norm, np.linalg.norm(flat(grads)))
    close(seen.slope, flat(v) @ flat(expected))
    assert set(seen._fields) == {"loss_plus", "grad_norm", "slope", "guarded_steps"}
    assert seen.guarded_steps == 0
    scaled = step(asam(loss_fn, rho, 0.2, ascent_only=True), grads, params, batch)[1]  # whose v is not of length 1
    direction = (np.abs(flat(params)) + 0.2) ** 2 * flat(grads)
    assert abs(float(scaled.slope)) <= float(np.linalg.norm(flat(expected))) * 2
    assert np.sign(scaled.slope) == np.sign(direction @ flat(expected))


@pytest.mark.parametrize(("name", "evaluations"), [("sam", 1), ("asam", 1), ("rsam", 2)])
def test_the_loss_is_never_evaluated_at_w(name, evaluations):
    calls = []

    def counted(params, batch):
        calls.append(1)
        return LOSS_FN(params, batch)

    tx = METHODS[name](counted, ascent_only=True)
    jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, batch=BATCH)
    assert len(calls) == evaluations


def test_a_step_costs_one_evaluation_and_a_part_of_one():
    loss_fn, params, batch = mlp(examples=4096)

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    def ours(params, state, batch):
        grads = jax.grad(loss_fn)(params, part(4, batch))
        return tx.update(grads, state, params, batch=batch)

    tx = sam(loss_fn, ascent_only=True)
    one = flops(jax.value_and_grad(loss_fn), params, batch)
    assert flops(ours, params, tx.init(params), batch) == pytest.approx(1.25 * one, rel=0.05)


def test_a_broken_probe_gives_the_parts_gradient_and_is_counted():
    broken = broken_at(lambda w: jnp.sum(w**2), lambda w: w[0] > 1.01)
    w, grads = jnp.ones(2), jnp.array([1.0, 0.5])
    tx = sam(broken, 0.1, ascent_only=True)
    found, state = tx.update(grads, tx.init(w), w)
    np.testing.assert_array_equal(found, grads)
    assert state.diagnostics.guarded_steps == 1


def test_methods_that_read_the_gradient_do_not_take_it():
    for method in (crsam_jax.wsam, crsam_jax.gsam, crsam_jax.crsam, crsam_jax.gradient_norm_penalty):
        assert "ascent_only" not in inspect.signature(method).parameters
    with pytest.raises(TypeError, match="ascent_only must be True or False"):
        sam(LOSS_FN, ascent_only=4)


def test_policies_that_read_the_gradient_refuse_it():
    tx = sam(LOSS_FN, ascent_only=True)
    for policy in (look, adaptive_policy):
        with pytest.raises(ValueError, match="reads the gradient of every step"):
            policy(periodic(tx, 2)).init(PARAMS)
        policy(sam(LOSS_FN)).init(PARAMS)


def test_it_injects_scans_and_is_checked():
    tx = optax.chain(
        optax.inject_hyperparams(sam, static_args="loss_fn")(LOSS_FN, rho=0.1, ascent_only=True), optax.sgd(0.1)
    )
    check_setup(tx, LOSS_FN, PARAMS, batch=BATCH)

    def one(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(LOSS_FN)(params, part(4)), state, params, batch=BATCH)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "loss_plus")

    _, losses = jax.lax.scan(one, (PARAMS, tx.init(PARAMS)), length=20)
    assert losses[-1] < losses[0]
