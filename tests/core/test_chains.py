"""At the head of optax chains: the orders that are right, and what betrays the one that is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import crsam, sam
from tests.core.problems import MEMBERS, flat, mlp

LOSS_FN, PARAMS, _ = mlp(examples=16)
BATCHES = [mlp(seed, examples=16)[2] for seed in range(4)]


def run(tx, steps=4, params=PARAMS):
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(LOSS_FN)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    for batch in BATCHES[:steps]:
        params, state = step(params, state, batch)
    return params, state


BASES = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-3),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 4)),
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["crsam", "gsam"])
def test_the_base_optimizer_sees_the_members_gradient_and_nothing_else(name, base):
    member, optimizer = MEMBERS[name](LOSS_FN, rho=0.3), BASES[base]()
    params, state, member_state = PARAMS, optimizer.init(PARAMS), member.init(PARAMS)
    for batch in BATCHES:
        grads = jax.grad(LOSS_FN)(params, batch)
        gradient, member_state = member.update(grads, member_state, params, batch=batch)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    found, _ = run(optax.chain(MEMBERS[name](LOSS_FN, rho=0.3), BASES[base]()))
    np.testing.assert_allclose(flat(found), flat(params), rtol=1e-4, atol=1e-5)
    plain, _ = run(BASES[base]())
    assert np.linalg.norm(flat(found) - flat(plain)) > 1e-4


def test_named_chain_is_the_chain_and_diagnostics_are_found_in_it():
    named, state = run(optax.named_chain(("sharpness", crsam(LOSS_FN)), ("base", optax.sgd(0.1))))
    plain, _ = run(optax.chain(crsam(LOSS_FN), optax.sgd(0.1)))
    np.testing.assert_array_equal(flat(named), flat(plain))
    assert optax.tree.get(state, "curvature") == state["sharpness"].diagnostics.curvature


def test_multisteps_behind_it_accumulates_the_members_gradients_by_hand():
    every, rate = 2, 0.5
    tx = optax.chain(crsam(LOSS_FN), optax.MultiSteps(optax.sgd(rate), every).gradient_transformation())
    found, _ = run(tx)
    member, params = crsam(LOSS_FN), PARAMS
    for start in range(0, 4, every):
        gradients = []
        for batch in BATCHES[start : start + every]:  # all at the same params
            grads = jax.grad(LOSS_FN)(params, batch)
            gradients.append(member.update(grads, member.init(params), params, batch=batch)[0])
        params = jax.tree.map(lambda w, *gs: w - rate * sum(gs) / every, params, *gradients)
    np.testing.assert_allclose(flat(found), flat(params), rtol=1e-5, atol=1e-6)


def slope_over_norm(tx, steps):
    state = run(tx, steps)[1]
    return float(optax.tree.get(state, "slope") / optax.tree.get(state, "grad_norm"))


def test_slope_far_from_grad_norm_betrays_a_gradient_of_other_data():
    """MultiSteps around it pairs the mean gradient with the last micro-batch's probes."""
    right = optax.chain(crsam(LOSS_FN, rho=0.01), optax.MultiSteps(optax.sgd(0.0), 4).gradient_transformation())
    wrong = optax.MultiSteps(optax.chain(crsam(LOSS_FN, rho=0.01), optax.sgd(0.0)), 4).gradient_transformation()
    assert slope_over_norm(right, 4) == pytest.approx(1, abs=0.02)
    assert abs(slope_over_norm(wrong, 4) - 1) > 0.1


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_slope_far_from_grad_norm_betrays_a_scaled_gradient(scale):
    tx = crsam(LOSS_FN, rho=0.01)
    grads = jax.tree.map(lambda g: scale * g, jax.grad(LOSS_FN)(PARAMS, BATCHES[0]))
    diagnostics = tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCHES[0])[1].diagnostics
    assert float(diagnostics.slope / diagnostics.grad_norm) == pytest.approx(1 / scale, rel=0.02)


def test_clean_pass_and_state_agree_on_the_loss_and_value_is_ignored():
    tx = crsam(LOSS_FN)
    loss, grads = jax.value_and_grad(LOSS_FN)(PARAMS, BATCHES[0])
    results = [tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCHES[0], **e) for e in ({}, {"value": 100.0})]
    assert results[0][1].diagnostics.loss == loss
    np.testing.assert_array_equal(flat(results[0]), flat(results[1]))


def test_value_reaches_another_link_of_the_chain():
    tx = optax.chain(crsam(LOSS_FN), optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    grads = jax.grad(LOSS_FN)(PARAMS, BATCHES[0])
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(grads, state, PARAMS, batch=BATCHES[0], value=100.0)
    assert optax.tree.get(state, "best_value") == 100
    assert optax.tree.get(state, "loss") < 10


def test_apply_if_finite_behind_it_skips_the_step_with_the_broken_gradient():
    def loss_fn(params, batch):
        return jnp.sum(params**2) * batch

    tx = optax.chain(crsam(loss_fn), optax.apply_if_finite(optax.sgd(0.1), 5))
    params = jnp.ones(2)
    state = tx.init(params)
    for batch, steps in ((1.0, True), (jnp.nan, False), (1.0, True)):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        assert np.any(flat(updates)) == steps
        params = optax.apply_updates(params, updates)
    assert optax.tree.get(state, "total_notfinite") == 1
    assert optax.tree.get(state, "guarded_steps") == 1
    assert np.all(np.isfinite(params))


def test_fine_tuning_with_a_mask_and_a_partition_behind_it():
    labels = {"first": "frozen", "second": "tuned"}
    tx = optax.chain(
        crsam(LOSS_FN, mask={"first": False, "second": True}),
        optax.partition({"tuned": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels),
    )
    params, state = run(tx)
    np.testing.assert_array_equal(flat(params["first"]), flat(PARAMS["first"]))
    assert np.linalg.norm(flat(params["second"]) - flat(PARAMS["second"])) > 0.01
    assert optax.tree.get(state, "slope") < optax.tree.get(state, "grad_norm")  # the norm is over all, v over a part


def test_extra_arguments_of_other_links_are_ignored_by_it():
    tx = optax.chain(sam(LOSS_FN), optax.sgd(0.1))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=BATCHES[0], grad_fn=None, step=3, value=jnp.nan)
    assert np.all(np.isfinite(flat(updates)))
