"""Decoupled WSAM: the base optimizer sees g alone, the sharpness term none of the base optimizer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import decoupled_wsam, wsam
from crsam_jax.ascents import adaptive_ascent
from tests.core.problems import broken_at, flat

pytestmark = pytest.mark.usefixtures("x64")

close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
SCALES = np.array([1.0, 2.0, 5.0, 0.5])
W = np.array([0.3, -1.0, 0.7, 2.0])
ETA, RHO, GAMMA = 0.05, 0.4, 0.8


def loss_fn(w):
    return jnp.sum(SCALES * w**2) / 2 + jnp.sum(jnp.sin(w)) / 3


def gradient(w):
    return SCALES * w + np.cos(w) / 3


def train(tx, steps=6, loss_fn=loss_fn):
    """The params after each step."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state, trace = jnp.asarray(W), tx.init(jnp.asarray(W)), []
    for _ in range(steps):
        params, state = step(params, state)
        trace.append(np.asarray(params))
    return np.array(trace)


def sharpness(w, rho=RHO):
    g = gradient(w)
    return gradient(w + rho * g / np.linalg.norm(g)) - g


def momentum_in_numpy(steps):
    w, m, trace = W, 0, []
    for _ in range(steps):
        m = 0.9 * m + gradient(w)
        w = w - ETA * m - ETA * GAMMA / (1 - GAMMA) * sharpness(w)
        trace.append(w)
    return np.array(trace)


def adamw_in_numpy(steps, decay=0.1):
    w, m, v, trace = W, 0, 0, []
    for t in range(1, steps + 1):
        g = gradient(w)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * w
        w = w - ETA * step - ETA * GAMMA / (1 - GAMMA) * sharpness(w)
        trace.append(w)
    return np.array(trace)


@pytest.mark.parametrize(
    ("base", "reference"),
    [(optax.sgd(ETA, momentum=0.9), momentum_in_numpy), (optax.adamw(ETA, weight_decay=0.1), adamw_in_numpy)],
    ids=["momentum", "adamw"],
)
def test_training_is_a_loop_in_numpy(base, reference):
    """Neither momentum nor preconditioning nor weight decay touches the sharpness term."""
    close(train(decoupled_wsam(loss_fn, base, ETA, RHO, GAMMA)), reference(6))


def test_closed_form_on_a_quadratic():
    """g⁺ − g = ρHv."""
    hessian = np.diag(SCALES) + 0.3
    quadratic = lambda w: 0.5 * w @ hessian @ w
    g = hessian @ W
    tx = decoupled_wsam(quadratic, optax.sgd(0.3), 0.2, rho=1.5, gamma=0.75)
    updates, _ = tx.update(jnp.asarray(g), tx.init(W), W)
    close(updates, -0.3 * g - 0.2 * 3 * 1.5 * hessian @ g / np.linalg.norm(g))


# Reductions


@pytest.mark.parametrize("options", [{}, {"ascent": adaptive_ascent()}], ids=["gradient", "adaptive"])
def test_with_plain_sgd_it_is_coupled_wsam(options):
    coupled = optax.chain(wsam(loss_fn, RHO, GAMMA, **options), optax.sgd(ETA))
    close(train(decoupled_wsam(loss_fn, optax.sgd(ETA), ETA, RHO, GAMMA, **options)), train(coupled))


def test_with_momentum_it_is_not():
    coupled = optax.chain(wsam(loss_fn, RHO, GAMMA), optax.sgd(ETA, momentum=0.9))
    decoupled = decoupled_wsam(loss_fn, optax.sgd(ETA, momentum=0.9), ETA, RHO, GAMMA)
    assert np.abs(train(decoupled) - train(coupled)).max() > 1e-2


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"rho": 0.0}, {"learning_rate": 0.0}])
def test_without_weight_the_base_optimizer_is_left(options):
    options = {"learning_rate": ETA, "rho": RHO, "gamma": GAMMA, **options}
    close(train(decoupled_wsam(loss_fn, optax.adam(ETA), **options)), train(optax.adam(ETA)))


def test_schedules_read_the_count():
    learning_rate, rho, gamma = (optax.linear_schedule(*ends, 3) for ends in ((0.1, 0.02), (0.0, 0.5), (0.9, 0.1)))
    w, expected = W, []
    for t in range(4):
        share = gamma(t)
        term = sharpness(w, float(rho(t)))
        w = w - float(learning_rate(t)) * (gradient(w) + float(share / (1 - share)) * term)
        expected.append(w)
    found = train(decoupled_wsam(loss_fn, optax.sgd(learning_rate), learning_rate, rho, gamma), steps=4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # numpy's schedules run in float32


# Guards


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_broken_or_zero_gradient_is_the_base_optimizers(value):
    base = optax.sgd(ETA, momentum=0.9)
    tx = decoupled_wsam(loss_fn, base, ETA, RHO, GAMMA)
    grads = jnp.zeros(4) if value == 0 else jnp.array([1.0, value, 0.0, 2.0])
    updates, state = tx.update(grads, tx.init(W), W)
    np.testing.assert_array_equal(updates, base.update(grads, base.init(W), W)[0])
    assert state.sharpness.diagnostics.guarded_steps == 1


def test_a_broken_probe_leaves_the_sharpness_term_out():
    broken = broken_at(loss_fn, lambda w: jnp.any(w != W))
    tx = decoupled_wsam(broken, optax.sgd(ETA), ETA, RHO, GAMMA)
    g = jnp.asarray(gradient(W))
    updates, state = tx.update(g, tx.init(W), W)
    np.testing.assert_array_equal(updates, -ETA * g)
    assert state.sharpness.diagnostics.guarded_steps == 1


def test_it_guards_what_apply_if_finite_needs_to_see():
    tx = optax.apply_if_finite(decoupled_wsam(loss_fn, optax.sgd(ETA), ETA), 3)
    updates, state = tx.update(jnp.full(4, jnp.nan), tx.init(W), W)
    assert not np.any(updates)
    assert optax.tree.get(state, "notfinite_count") == 1


# State and types


def test_state_contract():
    """One compilation with donation; scan is the loop; strong types and structure stay; params of the base alone."""
    tx = decoupled_wsam(loss_fn, optax.adam(ETA), optax.constant_schedule(ETA))

    def step(carry, _=None):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    signature = lambda state: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    start = lambda: (jnp.array(W), tx.init(W))
    jitted, carry = jax.jit(step, donate_argnums=0), start()
    before = signature(carry[1])
    assert not any(x.weak_type for x in jax.tree.leaves(carry[1]))
    for _ in range(3):
        carry, _ = jitted(carry)
    assert jitted._cache_size() == 1
    assert signature(carry[1]) == before
    close(flat(jax.lax.scan(step, start(), None, 3)[0]), flat(carry))
    mapped = optax.tree_map_params(tx, lambda x: x + 10, tx.init(W), transform_non_params=lambda x: x - 1)
    assert [x.shape for x in jax.tree.leaves(mapped) if np.all(x == 10)] == [W.shape] * 2  # Adam's moments
    assert optax.tree.get(carry[1], "loss_plus") > optax.tree.get(carry[1], "loss")


def test_inject_hyperparams_with_only_loss_fn_static():
    make = optax.inject_hyperparams(decoupled_wsam, static_args="loss_fn")
    tx = make(loss_fn, optax.sgd(ETA, momentum=0.9), learning_rate=ETA, rho=optax.constant_schedule(RHO), gamma=GAMMA)
    np.testing.assert_allclose(train(tx), momentum_in_numpy(6), rtol=1e-6)
    state = tx.init(W)
    assert {"learning_rate", "rho", "gamma"} <= set(state.hyperparams)
    state.hyperparams["gamma"] = jnp.zeros(())
    np.testing.assert_array_equal(tx.update(jnp.ones(4), state, W)[0], -ETA * np.ones(4))


def test_half_precision_params_get_updates_of_their_own_dtype():
    w = jnp.asarray(W, jnp.bfloat16)
    tx = decoupled_wsam(lambda w: jnp.sum(w.astype(jnp.float32) ** 2), optax.sgd(ETA), ETA)
    updates, _ = tx.update(w, tx.init(w), w)
    assert updates.dtype == jnp.bfloat16


def test_extra_arguments_reach_the_loss_and_the_base_optimizer():
    seen = []
    loss = lambda w, batch: jnp.sum(batch * w**2)
    spy = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda updates, state, params=None, **extra: (seen.append(extra), (updates, state))[1]
    )
    tx = decoupled_wsam(loss, spy, ETA)
    tx.update(jnp.ones(4), tx.init(W), W, batch=jnp.ones(4), value=1.0)
    assert set(seen[0]) == {"batch", "value"}


def test_bad_arguments():
    make = partial(decoupled_wsam, loss_fn, optax.sgd(ETA))
    for options, name in (
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"gamma": 1.0}, "gamma"),
        ({"rho": np.nan}, "rho"),
    ):
        with pytest.raises(ValueError, match=name):
            make(**{"learning_rate": ETA, **options})
    tx = make(ETA)
    with pytest.raises(ValueError, match="params is None"):
        tx.update(jnp.ones(4), tx.init(W))


SCHEDULES = {
    "gamma reaches 1": {"gamma": lambda count: jnp.where(count == 1, 1.0, GAMMA)},
    "gamma is not finite": {"gamma": lambda count: jnp.where(count == 1, jnp.nan, GAMMA)},
    "gamma is negative": {"gamma": lambda count: jnp.where(count == 1, -0.1, GAMMA)},
    "rate is negative": {"learning_rate": lambda count: jnp.where(count == 1, -ETA, ETA)},
    "rate overflows": {"learning_rate": lambda count: jnp.where(count == 1, np.finfo(np.float64).max, ETA)},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_out_of_range_leaves_the_sharpness_term_out_and_is_counted(name):
    loss_fn = lambda w: jnp.sum(w**4)
    tx = decoupled_wsam(loss_fn, optax.sgd(ETA), **{"learning_rate": ETA, "gamma": GAMMA} | SCHEDULES[name])
    w = jnp.array([1.0, 30.0])
    state, grads, counts = tx.init(w), jax.grad(loss_fn)(w), []
    for step in range(3):
        updates, state = tx.update(grads, state, w)
        counts.append(int(state.sharpness.diagnostics.guarded_steps))
        assert np.array_equal(updates, -ETA * grads) == (step == 1)
        assert np.all(np.isfinite(updates))
    assert counts == [0, 1, 1]


def test_a_step_that_the_probe_has_counted_is_not_counted_twice():
    tx = decoupled_wsam(lambda w: jnp.sum(w**2), optax.sgd(ETA), ETA, gamma=lambda count: 1.0)
    w = jnp.ones(2)
    _, state = tx.update(jnp.zeros(2), tx.init(w), w)
    assert state.sharpness.diagnostics.guarded_steps == 1
