"""MSAM and S²-SAM: the same steps as with two buffers, w and m, whatever stands around and inside."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.flatten_util import ravel_pytree

from crsam_jax import eval_params, msam, s2sam
from crsam_jax.shifted import OneEvaluationState
from tests.core.problems import flat, mlp, polynomial

METHODS = {"msam": partial(msam, decay=0.8), "s2sam": s2sam}
SCHEDULE = optax.linear_schedule(0.3, 0.05, 30)
# As above, in the widest dtype: optax's schedules compute in float32, and not to the same digit under jit.
WIDE_SCHEDULE = lambda count: 0.3 - 0.005 * jnp.asarray(count, float)
BASES = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05, momentum=0.9, nesterov=True)),
    "adamw": lambda: optax.adamw(lambda count: 0.02 * 0.98 ** jnp.asarray(count, float), weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.rmsprop(0.01)),
}


def batches(count, dtype=jnp.float32):
    return [mlp(seed, examples=8, dtype=dtype)[2] for seed in range(count)]


def make_step(tx, loss_fn):
    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return step


def two_buffers(name, base, rho, loss_fn, params, data):
    """The papers' algorithms as they are written, w and m apart: w after each step, and the point of each gradient."""
    w, unravel = ravel_pytree(params)
    m, state = np.zeros(w.size), base.init(params)
    trajectory, points = [], []
    for t, batch in enumerate(data):
        radius = float(rho(t))
        length = np.linalg.norm(m)
        e = {"msam": -1, "s2sam": 1}[name] * radius * m / length if length else np.zeros(w.size)
        points.append(w + e)
        grads = jax.grad(loss_fn)(unravel(jnp.asarray(w + e)), batch)
        updates, state = base.update(grads, state, unravel(jnp.asarray(w)))
        w = w + flat(updates)
        m = 0.8 * m + flat(grads) if name == "msam" else flat(grads)
        trajectory.append(w)
    return trajectory, points


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_algorithm_with_two_buffers(x64, name, base):
    loss_fn, params, _ = mlp(dtype=jnp.float64)
    data = batches(50, jnp.float64)
    tx = METHODS[name](BASES[base](), WIDE_SCHEDULE)
    step, carry = jax.jit(make_step(tx, loss_fn)), (params, tx.init(params))
    trajectory, points = two_buffers(name, BASES[base](), WIDE_SCHEDULE, loss_fn, params, data)
    for batch, w, point in zip(data, trajectory, points, strict=True):
        np.testing.assert_allclose(flat(carry[0]), point, rtol=0, atol=1e-12)  # where the gradient is taken
        carry, _ = step(carry, batch)
        np.testing.assert_allclose(flat(eval_params(carry[1], carry[0])), w, rtol=0, atol=1e-12)
    assert carry[1].step_count == 50
    assert carry[1].diagnostics.guarded_steps == 0


@pytest.mark.parametrize(("name", "sign"), [("msam", -1), ("s2sam", 1)])
def test_one_dimension_in_closed_form(x64, name, sign):
    """On ½hw² with SGD and w > 0 all the way, w ± ρ shrinks by 1 − ηh a step after the first, which has no shift."""
    h, eta, rho, start, steps = 2.0, 0.1, 0.05, 3.0, 12
    tx = METHODS[name](optax.sgd(eta), rho)
    carry, step = (jnp.array([start]), tx.init(jnp.array([start]))), make_step(tx, lambda w, batch: h / 2 * w[0] ** 2)
    for _ in range(steps):
        carry, _ = step(carry, None)
    expected = (start * (1 - eta * h) + sign * rho) * (1 - eta * h) ** (steps - 1) - sign * rho
    np.testing.assert_allclose(eval_params(carry[1], carry[0]), [expected], rtol=1e-13)
    np.testing.assert_allclose(carry[0], [expected + sign * rho], rtol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_on_a_quadratic_slope_and_norm_are_those_at_the_shifted_point(x64, name):
    problem, tx = polynomial(cubic=False), METHODS[name](optax.sgd(0.05), 0.3)
    params, state = problem.params, tx.init(problem.params)
    assert state.diagnostics == (0, 0, 0)
    for t in range(3):
        w, shifted = flat(eval_params(state, params)), flat(params)
        gradient = problem.hessian @ shifted + problem.linear
        updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
        np.testing.assert_allclose(state.diagnostics.grad_norm, np.linalg.norm(gradient), rtol=1e-12)
        np.testing.assert_allclose(state.diagnostics.slope, gradient @ (shifted - w) / 0.3, rtol=1e-10, atol=1e-14)
        assert np.linalg.norm(shifted - w) == pytest.approx(0.3 if t else 0.0, rel=1e-12)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_rho_of_zero_is_the_base_optimizer_bit_for_bit(name, base, dtype):
    loss_fn, params, _ = mlp(dtype=dtype)
    plain, wrapped = BASES[base](), METHODS[name](BASES[base](), 0.0)
    carry, expected = (params, wrapped.init(params)), (params, plain.init(params))
    for batch in batches(5, dtype):
        carry, _ = make_step(wrapped, loss_fn)(carry, batch)
        expected, _ = make_step(plain, loss_fn)(expected, batch)
    chex.assert_trees_all_equal(carry[0], expected[0])
    chex.assert_trees_all_equal(carry[1].base_optimizer_state, expected[1])
    chex.assert_trees_all_equal(eval_params(carry[1], carry[0]), carry[0])


# State, and what carries it


def signature(state):
    return jax.tree.structure(state), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", METHODS)
def test_dtypes_and_structure_are_constant_and_no_buffer_is_shared(name, dtype):
    loss_fn, params, batch = mlp(dtype=dtype)
    tx = METHODS[name](optax.sgd(1e-2, momentum=0.9), SCHEDULE)
    start = tx.init(params)
    (moved, state), _ = jax.jit(make_step(tx, loss_fn))((params, start), batch)
    assert signature(start) == signature(state)
    assert not any(x.weak_type for x in jax.tree.leaves(start))
    for tree in (moved, eval_params(state, moved)):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    for held in (start, state):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(held)]
        assert len(set(pointers)) == len(pointers)
    assert state.shift.rho.dtype == jnp.float32
    distance = np.linalg.norm(flat(moved) - flat(eval_params(state, moved)))
    assert distance == pytest.approx(float(SCHEDULE(1)), rel=1e-5 if dtype == jnp.float32 else 0.05)


@pytest.mark.parametrize("name", METHODS)
def test_scan_is_the_loop_with_one_compilation_and_donation(name, x64):
    loss_fn, params, _ = mlp(dtype=jnp.float64)
    data = batches(6, jnp.float64)
    tx = METHODS[name](optax.sgd(0.1, momentum=0.9), SCHEDULE)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_step(tx, loss_fn), n=1), donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
    for batch in data:
        given = carry
        carry, _ = step(carry, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given[0], given[1].memory)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    scanned, _ = jax.lax.scan(make_step(tx, loss_fn), (params, tx.init(params)), stacked)
    chex.assert_trees_all_close(scanned, carry, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_vmap_over_seeds_is_each_seed_alone(name, x64):
    loss_fn, _, batch = mlp(dtype=jnp.float64)
    seeds = [mlp(seed, dtype=jnp.float64)[1] for seed in (5, 6)]
    tx = METHODS[name](optax.adam(0.1), 0.2)

    def run(params):
        carry = params, tx.init(params)
        for _ in range(3):
            carry, _ = make_step(tx, loss_fn)(carry, batch)
        return carry, eval_params(carry[1], carry[0])

    together = jax.vmap(run)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
    for i, params in enumerate(seeds):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), run(params), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_continues_bit_for_bit(name, tmp_path):
    loss_fn, params, _ = mlp()
    data = batches(5)
    tx = METHODS[name](optax.adam(1e-2), SCHEDULE)
    step = jax.jit(make_step(tx, loss_fn))
    carry = params, tx.init(params)
    for batch in data[:3]:
        carry, _ = step(carry, batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: (params, tx.init(params))))
    for batch in data[3:]:
        carry, _ = step(carry, batch)
        restored, _ = step(restored, batch)
    assert jax.tree.structure(restored) == jax.tree.structure(carry)
    chex.assert_trees_all_equal(restored, carry)


@pytest.mark.parametrize("name", METHODS)
def test_tree_map_params_finds_the_memory_and_the_base_optimizers(name):
    _, params, _ = mlp()
    tx = METHODS[name](optax.sgd(0.1, momentum=0.9))
    mapped = optax.tree_map_params(tx, lambda x: x + 1, tx.init(params), transform_non_params=lambda x: x - 1)
    np.testing.assert_array_equal(flat((mapped.memory, mapped.base_optimizer_state)), 1)
    np.testing.assert_array_equal(flat((mapped.step_count, mapped.shift, mapped.diagnostics)), -1)


def test_inject_hyperparams_sets_the_next_shift():
    loss_fn, params, batch = mlp()
    plain = msam(optax.sgd(0.1), 0.3, 0.8)
    injected = optax.inject_hyperparams(msam)(optax.sgd(0.1), rho=0.3, decay=0.8)
    carries = (params, plain.init(params)), (params, injected.init(params))
    for _ in range(3):
        carries = tuple(
            jax.jit(make_step(tx, loss_fn))(carry, batch)[0]
            for tx, carry in zip((plain, injected), carries, strict=True)
        )
    chex.assert_trees_all_close(carries[0][0], carries[1][0], rtol=1e-6)
    held, state = carries[1]
    state.hyperparams["rho"] = jnp.zeros(())
    (held, state), _ = make_step(injected, loss_fn)((held, state), batch)
    chex.assert_trees_all_equal(eval_params(state, held), held)


# What stands around and inside


def test_around_it_chains_accumulation_and_other_wrappers(x64):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    accumulated = optax.MultiSteps(s2sam(optax.sgd(0.1), 0.3), 2)
    direct = s2sam(optax.sgd(0.1), 0.3)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    carry, expected = (params, accumulated.init(params)), (params, direct.init(params))
    for _ in range(3):
        for half in halves:
            carry, _ = make_step(accumulated, loss_fn)(carry, half)
        expected, _ = make_step(direct, loss_fn)(expected, batch)  # MultiSteps takes its mean in float32
    chex.assert_trees_all_close(carry[0], expected[0], rtol=1e-4, atol=1e-6)
    found = eval_params(carry[1], carry[0])
    chex.assert_trees_all_close(found, eval_params(expected[1], expected[0]), rtol=1e-4, atol=1e-6)

    clipped = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(0.1), direct), 3)
    (held, state), _ = make_step(clipped, loss_fn)((params, clipped.init(params)), batch)
    assert np.linalg.norm(flat(held) - flat(eval_params(state, held))) == pytest.approx(0.3)


def test_inside_a_partition_its_part_is_shifted_and_undone():
    loss_fn, params, batch = mlp()
    tx = optax.partition(
        {"sharp": s2sam(optax.sgd(0.1), 0.3), "plain": optax.sgd(0.1)}, {"first": "sharp", "second": "plain"}
    )
    carry, _ = make_step(tx, loss_fn)((params, tx.init(params)), batch)
    w = eval_params(carry[1], carry[0])
    expected, _ = make_step(optax.sgd(0.1), loss_fn)((params, optax.sgd(0.1).init(params)), batch)
    chex.assert_trees_all_close(w, expected[0], rtol=1e-6)
    chex.assert_trees_all_equal(w["second"], carry[0]["second"])
    assert np.linalg.norm(flat(carry[0]["first"]) - flat(w["first"])) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_restricts_the_perturbation_and_its_norm(name, x64):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    for mask in ({"first": {"w": True, "b": False}, "second": False}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)):
        tx = METHODS[name](optax.sgd(0.1), 0.3, mask=mask)
        carry = params, tx.init(params)
        for _ in range(3):
            carry, _ = make_step(tx, loss_fn)(carry, batch)
        moved = jax.tree.map(jnp.subtract, carry[0], eval_params(carry[1], carry[0]))
        assert np.linalg.norm(flat(moved)) == pytest.approx(0.3, rel=1e-12)
        assert not any(np.any(moved[layer]["b"]) for layer in moved)
        assert np.linalg.norm(moved["second"]["w"]) == 0 or callable(mask)
    tx = METHODS[name](optax.sgd(0.1), mask={"third": True})
    with pytest.raises(ValueError, match="mask must be a prefix of params"):
        tx.update(params, tx.init(params), params)


# Guards


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_not_finite_undoes_the_shift_and_leaves_no_trace(name, base, bad):
    loss_fn, params, batch = mlp()
    tx = METHODS[name](BASES[base](), SCHEDULE)
    carry = params, tx.init(params)
    for _ in range(3):
        carry, _ = make_step(tx, loss_fn)(carry, batch)
    held, state = carry
    w = eval_params(state, held)
    grads = jax.grad(loss_fn)(held, batch)
    grads["first"]["b"] = grads["first"]["b"].at[2].set(bad)
    updates, after = jax.jit(tx.update)(grads, state, held)
    back = optax.apply_updates(held, updates)
    chex.assert_trees_all_close(back, w, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_equal(eval_params(after, back), back)
    assert after.diagnostics.guarded_steps == 1
    for field in ("step_count", "memory", "base_optimizer_state"):
        chex.assert_trees_all_equal(getattr(after, field), getattr(state, field))
    (held, state), _ = make_step(tx, loss_fn)((back, after), batch)  # and on it goes
    assert np.isfinite(flat((held, state))).all()
    assert np.linalg.norm(flat(held) - flat(eval_params(state, held))) == pytest.approx(float(SCHEDULE(4)), rel=1e-4)
    assert state.diagnostics.guarded_steps == 1


def test_random_keys_in_the_base_optimizers_state_pass_the_guard():
    _, params, _ = mlp()
    tx = s2sam(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)))
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert np.isfinite(flat(updates)).all()
    assert state.diagnostics.guarded_steps == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e19, 1e30, 1e37])
def test_norms_neither_overflow_nor_underflow(name, scale):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    gradient = jax.tree.map(lambda p: scale * jnp.cos(jnp.arange(float(p.size))).reshape(p.shape), params)
    tx = METHODS[name](optax.set_to_zero(), 0.25)
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    expected = {"msam": -0.25, "s2sam": 0.25}[name] * flat(gradient) / np.linalg.norm(flat(gradient))
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-5, atol=1e-8)
    assert state.diagnostics.guarded_steps == 0


@pytest.mark.parametrize("name", METHODS)
def test_without_a_direction_or_a_valid_radius_the_next_gradient_is_at_w(name):
    params = jnp.ones(3)
    for gradient, rho in (
        (jnp.zeros(3), 0.1),
        (jnp.full(3, 1e-42), 0.1),
        (jnp.ones(3), lambda count: -0.1),
        (jnp.ones(3), lambda count: jnp.nan),
        (jnp.ones(3), lambda count: jnp.inf),
    ):
        tx = METHODS[name](optax.sgd(0.5), rho)
        updates, state = tx.update(gradient, tx.init(params), params)
        np.testing.assert_array_equal(updates, -0.5 * gradient)
        np.testing.assert_array_equal(eval_params(state, params + updates), params + updates)
        assert state.diagnostics.guarded_steps == 1


@pytest.mark.parametrize("name", [msam, s2sam])
def test_updates_that_overflow_leave_the_shift_out_and_are_counted(name):
    w, g = jnp.array([8.0, 8.0], jnp.float16), jnp.array([-1.0, 1.0], jnp.float16)
    tx = name(optax.sgd(1.0), rho=lambda count: jnp.where(count == 1, 1e38, 0.5))
    updates, state = tx.update(g, tx.init(w), w)
    shifted = optax.apply_updates(w, updates)
    updates, after = tx.update(g, state, shifted)
    assert [int(s.diagnostics.guarded_steps) for s in (state, after)] == [1, 1]
    assert np.all(np.isfinite(updates))
    np.testing.assert_allclose(eval_params(after, optax.apply_updates(shifted, updates)), w - 2 * g, rtol=1e-3)


def test_a_momentum_that_overflows_is_not_remembered():
    params, gradient = jnp.ones(3), jnp.full(3, 2e38)
    tx = msam(optax.set_to_zero(), 0.1, 0.9)
    state = tx.init(params)
    for expected in (0, 1, 2):
        _, state = tx.update(gradient, state, params)
        assert state.diagnostics.guarded_steps == expected
        np.testing.assert_array_equal(state.memory, gradient)
    _, state = tx.update(-gradient, state, params)
    assert float(state.shift.rho) == pytest.approx(0.1)


def test_errors_say_what_to_do():
    loss_fn, params, _ = mlp()
    with pytest.raises(TypeError, match=r"msam wraps a base optimizer, such as optax.sgd.*needs no loss_fn"):
        msam(loss_fn, 0.1)
    with pytest.raises(ValueError, match="rho must be finite and not negative"):
        s2sam(optax.sgd(0.1), -0.1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        msam(optax.sgd(0.1), decay=1.0)
    tx = s2sam(optax.sgd(0.1))
    with pytest.raises(ValueError, match="params is None, but s2sam moves them"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="has shape"):
        tx.update({**params, "first": jax.tree.map(lambda x: x[:1], params["first"])}, tx.init(params), params)
    with pytest.raises(TypeError, match="params has dtype int32"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2, int)), jnp.ones(2, int))
    with pytest.raises(ValueError, match="holds no state of msam or s2sam"):
        eval_params(optax.sgd(0.1).init(params), params)


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_digits(name):
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    train, test = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(size=(64, 32)) / 8, jnp.float32), "b1": jnp.zeros(32),
        "w2": jnp.asarray(rng.normal(size=(32, 10)) / 6, jnp.float32), "b2": jnp.zeros(10),
    }  # fmt: skip

    def logits_of(params, x):
        return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    def loss_fn(params, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()

    tx = METHODS[name](optax.sgd(optax.cosine_decay_schedule(0.1, 600), momentum=0.9), 0.2)
    order = np.concatenate([rng.permutation(1200) for _ in range(40)])[: 600 * 64].reshape(600, 64)
    (held, state), _ = jax.lax.scan(
        make_step(tx, loss_fn), (params, tx.init(params)), jax.tree.map(lambda x: x[order], train)
    )
    w = eval_params(state, held)
    assert isinstance(state, OneEvaluationState)
    assert loss_fn(w, train) < 0.05
    assert jnp.mean(jnp.argmax(logits_of(w, test[0]), -1) == test[1]) > 0.92
    assert state.diagnostics.guarded_steps == 0
