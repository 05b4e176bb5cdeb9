"""The state: one small pytree of strongly typed arrays that every transformation of jax and optax can carry."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from crsam_jax import crsam, crsam_gradient, sam
from crsam_jax.ascents import gradient_ascent
from tests.core.problems import MEMBERS, TWO_SIDED, flat, mlp

SCHEDULE = optax.linear_schedule(0.0, 0.2, 3)
LOSS_FN, PARAMS, _ = mlp(examples=8)
BATCHES = [mlp(seed, examples=8)[2] for seed in range(4)]
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *BATCHES)


def make_step(tx):
    def step(carry, batch):
        params, state = carry
        grads = jax.grad(LOSS_FN)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "loss")

    return step


def start(tx, params=PARAMS):
    return params, tx.init(params)


def signature(state):
    return jax.tree.structure(state), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", MEMBERS)
def test_structure_and_strong_types_are_constant_from_init_on(name):
    tx = MEMBERS[name](LOSS_FN, rho=SCHEDULE)
    before = tx.init(PARAMS)
    assert not any(x.weak_type for x in jax.tree.leaves(before))
    (_, eager), _ = make_step(tx)((PARAMS, before), BATCHES[0])
    (_, jitted), _ = jax.jit(make_step(tx))((PARAMS, before), BATCHES[0])
    assert signature(before) == signature(eager) == signature(jitted)


def test_a_weakly_typed_loss_leaves_no_trace():
    tx = crsam(lambda w: 2.0)
    state = tx.init(jnp.ones(2))
    assert signature(tx.update(jnp.ones(2), state, jnp.ones(2))[1]) == signature(state)


@pytest.mark.parametrize("name", MEMBERS)
def test_no_buffer_is_shared_between_fields(name):
    tx = MEMBERS[name](LOSS_FN, rho=0.0)  # where all the losses are equal
    before = tx.init(PARAMS)
    for state in (before, jax.jit(make_step(tx))((PARAMS, before), BATCHES[0])[0][1], jax.jit(tx.init)(PARAMS)):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_many_batches_compile_once_with_donation_and_a_schedule(name):
    tx = optax.chain(MEMBERS[name](LOSS_FN, rho=SCHEDULE), optax.adam(1e-2))
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_step(tx), n=1), donate_argnums=0)
    carry = start(tx, jax.tree.map(jnp.copy, PARAMS))
    for batch in BATCHES:
        given = carry
        carry, _ = step(carry, batch)
    read = given[0], given[1][0].step_count, optax.tree.get(given[1], "mu")
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read))  # what the step does not read is not its to donate
    assert optax.tree.get(carry[1], "diagnostics").loss > 0


@pytest.mark.parametrize("name", ["sam", "crsam_bounded"])
def test_scan_is_the_loop(name):
    tx = optax.chain(MEMBERS[name](LOSS_FN, rho=SCHEDULE), optax.sgd(0.1, momentum=0.9))
    step = make_step(tx)
    carry, losses = start(tx), []
    for batch in BATCHES:
        carry, loss = jax.jit(step)(carry, batch)
        losses.append(loss)
    scanned, scanned_losses = jax.lax.scan(step, start(tx), STACKED)
    chex.assert_trees_all_close(scanned, carry, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scanned_losses, losses, rtol=1e-5)


@pytest.mark.parametrize("name", ["asam", "crsam"])
def test_vmap_over_seeds_is_each_seed_alone(name, x64):
    tx = optax.chain(MEMBERS[name](LOSS_FN), optax.sgd(0.1))
    seeds = [mlp(seed, dtype=jnp.float64)[1] for seed in (5, 6)]
    _, _, batch = mlp(examples=8, dtype=jnp.float64)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    run = lambda params: make_step(tx)(start(tx, params), batch)
    together = jax.vmap(run)(stacked)
    for i, params in enumerate(seeds):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), run(params), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
def test_tree_map_params_finds_no_params_in_the_state(name):
    tx = optax.chain(MEMBERS[name](LOSS_FN), optax.sgd(0.1, momentum=0.9))
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state, transform_non_params=lambda x: x - 1)
    np.testing.assert_array_equal(flat(mapped[0]), -1)
    np.testing.assert_array_equal(flat(mapped[1]), 1)


def test_the_state_works_under_a_shape_only_init():
    tx = crsam(LOSS_FN)
    assert signature(jax.tree.map(jnp.zeros_like, jax.eval_shape(tx.init, PARAMS))) == signature(tx.init(PARAMS))


def test_schedules_read_the_count_and_diagnostics_are_read_by_name():
    tx = optax.chain(sam(LOSS_FN, rho=lambda count: 0.1 * count), optax.sgd(0.1))
    carry = start(tx)
    seen = []
    for _ in range(3):
        expected = optax.tree.get(carry[1], "step_count")
        carry, _ = make_step(tx)(carry, BATCHES[0])
        seen.append(float(optax.tree.get(carry[1], "loss_plus") - optax.tree.get(carry[1], "loss")))
        assert optax.tree.get(carry[1], "step_count") == expected + 1
    assert seen[0] == 0
    assert 0 < seen[1] < seen[2]


# inject_hyperparams


@pytest.mark.parametrize("name", MEMBERS)
def test_inject_hyperparams_with_only_loss_fn_static_changes_nothing(name):
    factory = MEMBERS[name]
    plain = factory(LOSS_FN, rho=0.1)
    if isinstance(factory, partial):
        options, factory = factory.keywords, factory.func
    else:
        options = {}
    injected = optax.inject_hyperparams(factory, static_args="loss_fn")(LOSS_FN, rho=0.1, **options)
    expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS, batch=BATCHES[0])
    update = jax.jit(lambda s: injected.update(PARAMS, s, PARAMS, batch=BATCHES[0]))
    found, state = update(injected.init(PARAMS))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    assert signature(state) == signature(injected.init(PARAMS))
    state.hyperparams["rho"] = jnp.zeros(())
    np.testing.assert_array_equal(flat(update(state)[0]), flat(PARAMS))


def test_inject_hyperparams_takes_schedules_of_every_number_at_once():
    numbers = ("rho", "alpha", "beta", "offset", "max_penalty_ratio")
    schedules = {name: optax.linear_schedule(0.2 + 0.1 * i, 0.9, 2) for i, name in enumerate(numbers)}
    options = {"ascent": gradient_ascent(), "mask": {"first": True, "second": False}, **schedules}
    plain = crsam(LOSS_FN, **options)
    injected = optax.inject_hyperparams(crsam, static_args="loss_fn")(LOSS_FN, **options)
    carries = start(plain), start(injected)
    steps = [jax.jit(make_step(tx)) for tx in (plain, injected)]
    for batch in BATCHES[:3]:
        carries = tuple(step(carry, batch)[0] for step, carry in zip(steps, carries, strict=True))
    chex.assert_trees_all_close(carries[0][0], carries[1][0], rtol=1e-5, atol=1e-6)
    for name in numbers:
        assert float(carries[1][1].hyperparams[name]) == pytest.approx(0.9)


def test_the_pure_function_takes_traced_numbers():
    """A sweep over α by vmap: validation skips tracers."""
    sweep = lambda alpha: crsam_gradient(LOSS_FN, 0.1, alpha)(PARAMS, batch=BATCHES[0])[0]
    together = jax.vmap(sweep)(jnp.array([0.0, 0.5]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], together), sweep(0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["asam", *TWO_SIDED[:1]])
def test_an_orbax_round_trip_in_mid_run_continues_bit_exactly(name, tmp_path):
    tx = optax.chain(MEMBERS[name](LOSS_FN, rho=SCHEDULE), optax.adam(1e-2))
    step = jax.jit(make_step(tx))
    carry = start(tx)
    for batch in BATCHES[:2]:
        carry, _ = step(carry, batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: start(tx)))
    for batch in BATCHES[2:]:
        carry, _ = step(carry, batch)
        restored, _ = step(restored, batch)
    assert jax.tree.structure(restored) == jax.tree.structure(carry)
    chex.assert_trees_all_equal(restored, carry)


@pytest.mark.parametrize("member", [sam, crsam])
def test_the_compiled_step_grows_in_proportion_to_the_number_of_leaves(member):
    """Copies of a chain over all leaves in each of them would grow with the square, and compile time with them."""

    def size(leaves):
        params = [jnp.ones(8)] * leaves
        loss_fn = lambda params: sum(jnp.mean(jnp.tanh(w) ** 2) for w in params)
        tx = optax.chain(member(loss_fn), optax.sgd(0.1))
        step = jax.jit(lambda params, state: tx.update(jax.grad(loss_fn)(params), state, params))
        return len(step.lower(params, tx.init(params)).compile().as_text())

    assert size(32) < 6 * size(8)
