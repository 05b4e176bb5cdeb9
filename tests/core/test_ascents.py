"""Ascents with noise, memory and sparse masks: R-SAM, ESAM, Momentum-SAM, Friendly SAM and SSAM."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from crsam_jax import crsam, random_probes, rsam, sam
from crsam_jax.ascents import (
    adaptive_ascent,
    dropped_ascent,
    dynamic_sparse_ascent,
    friendly_ascent,
    gradient_ascent,
    largest_fraction,
    masked_ascent,
    momentum_ascent,
    smoothed_ascent,
    sparse_ascent,
)
from tests.core.problems import broken_at, flat, one_step, polynomial, recording

pytestmark = pytest.mark.usefixtures("x64")

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
RHO = 0.4
MASK = {"bias": np.array([True]), "kernel": np.array([[True, False], [False, True]]), "scale": np.array(False)}
ASCENTS = {
    "smoothed": partial(smoothed_ascent, sigma=0.2),
    "dropped": dropped_ascent,
    "momentum": momentum_ascent,
    "friendly": friendly_ascent,
    "sparse": lambda: sparse_ascent(MASK),
    "dynamic": partial(dynamic_sparse_ascent, update_every=2, total_steps=8),
}


def gradients_of(problem, n, seed=0):
    """Trees of incoming gradients."""
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), problem.params) for _ in range(n)]


def directions(ascent, grads, params, gradient_fn=None):
    """The directions of successive steps as flat vectors, and the state after each."""
    state, found, states = ascent.init(params), [], []
    apply = jax.jit(lambda g, state: ascent.apply(g, state, params, gradient_fn))
    for g in grads:
        v, state = apply(g, state)
        found.append(flat(v))
        states.append(state)
    return np.array(found), states


def unit(x):
    return x / np.linalg.norm(x)


# Reductions


@pytest.mark.parametrize(
    "ascent",
    [
        smoothed_ascent(sigma=0.0),
        dropped_ascent(keep=1.0),
        friendly_ascent(sigma=0.0),
        sparse_ascent(jax.tree.map(np.ones_like, MASK)),
        dynamic_sparse_ascent(sparsity=0.0, update_every=1),
    ],
    ids=["smoothed", "dropped", "friendly", "sparse", "dynamic"],
)
def test_at_the_end_of_its_parameter_every_ascent_is_the_gradients(ascent):
    problem = polynomial(True)
    gradient_fn = jax.grad(problem.loss)
    for params in (problem.params, jax.tree.map(lambda p: p + 0.5, problem.params)):
        tx = sam(problem.loss, RHO, ascent=ascent)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(2):  # the memory of the first step must not matter in the second
            gradient, state = update(gradient_fn(params), state, params)
        close(flat(gradient), flat(one_step(sam(problem.loss, RHO), problem.loss, params)[0]))


def test_rsam_without_noise_is_sam():
    problem = polynomial(True)
    found, _ = one_step(rsam(problem.loss, RHO, sigma=0.0), problem.loss, problem.params)
    close(flat(found), flat(one_step(sam(problem.loss, RHO), problem.loss, problem.params)[0]))


# R-SAM


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_rsam_agrees_with_numpy(weight):
    """v ∝ Δ + λ ∇L(w+Δ), with Δ read off the points that were evaluated."""
    problem = polynomial(True)
    loss_fn, points = recording(problem.loss)
    tx = rsam(loss_fn, RHO, sigma=0.2, weight=weight, seed=5)
    w, unravel = flat(problem.params), ravel_pytree(problem.params)[1]
    gradient, _ = tx.update(jax.grad(problem.loss)(problem.params), tx.init(problem.params), problem.params)
    jax.effects_barrier()
    assert len(points) == 3  # w, w + Δ and w + ρv
    numpy_gradient = lambda x: flat(jax.grad(problem.loss)(unravel(x)))
    [noisy] = [p for p in points if not np.isclose(np.linalg.norm(p - w), [0, RHO]).any()]
    v = unit(noisy - w + weight * numpy_gradient(noisy))
    close(flat(gradient), numpy_gradient(w + RHO * v))
    assert min(np.linalg.norm(p - w - RHO * v) for p in points) < 1e-12


def noises(sigma, params, draws=4000):
    """Δ over many steps, as a tree with a leading axis."""

    def draw(count):
        seen = []
        smoothed_ascent(sigma, seed=3).apply(params, count, params, lambda point: (seen.append(point), point)[1])
        return jax.tree.map(jnp.subtract, seen[0], params)

    return jax.jit(jax.vmap(draw))(jnp.arange(draws))


def test_rsam_noise_is_normal_with_the_stated_variance_of_each_filter():
    sigma, n = 0.3, 4000
    params = {"kernel": jnp.array([[[1.0, 10.0], [2.0, 0.0]]]), "bias": jnp.array([3.0, 4.0]), "scale": jnp.array(2.0)}
    found = jax.tree.map(np.asarray, noises(sigma, params, n))
    kernel = np.array([5.0, 100.0]) / 2  # mean squares over each slice along the last axis
    variances = {"kernel": np.tile(kernel, (1, 2, 1)), "bias": np.full(2, 12.5), "scale": np.array(4.0)}
    for name, variance in variances.items():
        expected = sigma**2 * variance
        np.testing.assert_allclose(found[name].var(axis=0), expected, rtol=6 * np.sqrt(2 / n), err_msg=name)
        assert np.all(np.abs(found[name].mean(axis=0)) < 5 * np.sqrt(expected / n))
    total = sum((x**2).reshape(n, -1).sum(axis=1).mean() for x in found.values())
    assert total == pytest.approx(sigma**2 * np.sum(flat(params) ** 2), rel=0.1)
    together = np.concatenate([x.reshape(n, -1) for x in found.values()], axis=1)
    assert np.abs(np.corrcoef(together.T) - np.eye(7)).max() < 6 / np.sqrt(n)  # independent of each other
    assert np.abs(np.mean([(x**4).mean(0) / x.var(0) ** 2 for x in together.T]) - 3) < 0.2  # normal


def test_rsam_inside_a_mask_leaves_the_rest_alone():
    problem = polynomial(True)
    loss_fn, points = recording(problem.loss)
    mask = {"kernel": True, "bias": False, "scale": False}
    one_step(rsam(loss_fn, RHO, sigma=0.5, mask=mask), problem.loss, problem.params)
    jax.effects_barrier()
    moved = np.any(np.array(points) != flat(problem.params), axis=0)
    inside = flat(jax.tree.map(lambda is_in, p: np.full(p.shape, is_in), mask, problem.params)).astype(bool)
    np.testing.assert_array_equal(moved, inside)


# ESAM


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_dropped_ascent_keeps_each_element_with_its_probability(keep):
    g = jnp.asarray(np.random.default_rng(0).normal(size=400))
    ascent = dropped_ascent(keep, seed=2)
    found = np.asarray(jax.jit(jax.vmap(lambda count: ascent.apply(g, count, g)[0]))(jnp.arange(500)))
    kept = found != 0
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1 / keep)
    for v, m in zip(found[:5], kept[:5], strict=True):
        close(v, g * m / np.linalg.norm(g * m) / keep)
    deviation = np.sqrt(keep * (1 - keep))
    assert abs(kept.mean() - keep) < 5 * deviation / np.sqrt(kept.size)
    assert np.abs(kept.mean(axis=0) - keep).max() < 5 * deviation / np.sqrt(500)  # each element
    assert np.abs(kept.mean(axis=1) - keep).max() < 5 * deviation / np.sqrt(400)  # in each step


# Memory


def test_momentum_ascent_is_a_loop_in_numpy():
    """−b/‖b‖ with the buffer before the step; the first step is not perturbed."""
    problem = polynomial(True)
    grads = gradients_of(problem, 5)
    found, states = directions(momentum_ascent(0.7), grads, problem.params)
    b, expected = np.zeros(6), []
    for g in grads:
        expected.append(-unit(b) if b.any() else b)
        b = 0.7 * b + flat(g)
    close(found, expected)
    close(flat(states[-1]), b)


@pytest.mark.parametrize(("sigma", "decay"), [(1.0, 0.9), (0.5, 0.6)])
def test_friendly_ascent_is_a_loop_in_numpy(sigma, decay):
    """d = g − σ m with the mean before the step, which starts at the first g and follows g, not d."""
    problem = polynomial(True)
    grads = gradients_of(problem, 5)
    found, states = directions(friendly_ascent(sigma, decay), grads, problem.params)
    m, expected = np.zeros(6), []
    for g in map(flat, grads):
        expected.append(unit(g - sigma * m))
        m = decay * m + (1 - decay) * g if m.any() else g
    close(found, expected)
    close(flat(states[-1]), m)


@pytest.mark.parametrize("name", ["momentum", "friendly"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_gradient_leaves_the_memory_as_it_is(name, value):
    problem = polynomial(True)
    grads = gradients_of(problem, 2)
    broken = {**grads[1], "scale": jnp.array(value)}
    _, (before, after) = directions(ASCENTS[name](), [grads[0], broken], problem.params)
    np.testing.assert_array_equal(flat(after), flat(before))


def test_the_memory_of_half_precision_params_is_wide():
    w = jnp.ones(2, jnp.bfloat16)
    for ascent in (momentum_ascent(), friendly_ascent()):
        direction, state = ascent.apply(w, ascent.init(w), w)
        assert state.dtype == direction.dtype == jnp.float32


# Sparse masks


def test_sparse_ascent_sets_elements_to_zero_and_does_not_renormalize():
    problem = polynomial(True)
    g = gradients_of(problem, 1)[0]
    (found,), _ = directions(sparse_ascent(MASK), [g], problem.params)
    close(found, unit(flat(g)) * flat(MASK))
    gradient, seen = one_step(sam(problem.loss, RHO, ascent=sparse_ascent(MASK)), problem.loss, problem.params)
    w, unravel = flat(problem.params), ravel_pytree(problem.params)[1]
    v = unit(flat(jax.grad(problem.loss)(problem.params))) * flat(MASK)
    close(flat(gradient), flat(jax.grad(problem.loss)(unravel(w + RHO * v))))
    close(seen.loss_plus, float(problem.loss(unravel(w + RHO * v))))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_largest_fraction_is_a_global_ranking(fraction):
    rng = np.random.default_rng(0)
    scores = {"a": rng.integers(0, 5, size=(3, 4)).astype(float), "b": rng.normal(size=8), "c": np.array(9.0)}
    found = largest_fraction(jax.tree.map(jnp.asarray, scores), fraction)
    order = np.argsort(-flat(scores), kind="stable")[: round(fraction * 21)]
    np.testing.assert_array_equal(np.flatnonzero(flat(found)), np.sort(order))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(np.shape, scores)


def dynamic(n=60, steps=9, **options):
    """Masks before and after each step, and the gradients."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.zeros((n // 3, 2)), "b": jnp.zeros(n - n // 3 * 2)}
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params) for _ in range(steps)]
    ascent = dynamic_sparse_ascent(**options)
    found, states = directions(ascent, grads, params)
    masks = [flat(s.mask).astype(bool) for s in (ascent.init(params), *states)]
    return found, masks, [flat(g) for g in grads]


def test_dynamic_mask_drops_the_smallest_gradients_and_regrows_as_many_elsewhere():
    """⌊share · kept⌋ of them, the share falling along a cosine to nothing at T; never between updates."""
    drop, every, total = 0.8, 2, 8
    options = {"sparsity": 0.4, "drop": drop, "update_every": every, "total_steps": total, "seed": 1}
    found, masks, grads = dynamic(**options)
    regrown = []
    for i, g in enumerate(grads):
        before, after = masks[i], masks[i + 1]
        assert before.sum() == after.sum() == 36
        close(found[i], unit(g) * before)
        number = 0
        if (i + 1) % every == 0:
            share = drop * (1 + np.cos(np.pi * min((i + 1) / total, 1))) / 2
            number = min(int(np.floor(share * 36)), 24)  # there are 24 others to take in
        lost, won = np.flatnonzero(before & ~after), np.flatnonzero(after & ~before)
        assert len(lost) == len(won) == number
        kept = np.flatnonzero(before)
        assert set(lost) == set(kept[np.argsort(np.abs(g[kept]))[:number]])
        if 0 < number < 24:
            regrown.append(set(won) == set(np.flatnonzero(~before)[np.argsort(-np.abs(g[~before]))[:number]]))
    assert len(regrown) >= 2
    assert not all(regrown)  # at random, not by gradient


def test_dynamic_mask_is_random_at_the_start_and_repeats_with_its_seed():
    masks = [dynamic(steps=4, update_every=1, seed=seed)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert np.any(masks[0][0] != masks[2][0])


def test_a_broken_gradient_leaves_the_mask_as_it_is():
    ascent, g = dynamic_sparse_ascent(update_every=1), jnp.array([1.0, jnp.nan, 2.0, 3.0])
    state = ascent.init(g)
    direction, after = ascent.apply(g, state, g)
    np.testing.assert_array_equal(after.mask, state.mask)
    assert not np.any(direction)


# All of them


@pytest.mark.parametrize("name", ["smoothed", "dropped"])
def test_noise_depends_on_seed_and_step_alone(name):
    problem = polynomial(True)
    [g] = gradients_of(problem, 1)

    @jax.jit
    def draw(seed, count):
        return ASCENTS[name](seed=seed).apply(g, count, problem.params, lambda point: g)

    (first, after), (again, _), (other_seed, _) = (draw(seed, jnp.int32(4)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(flat(first), flat(again))
    assert after == 5
    assert not np.allclose(flat(first), flat(other_seed))
    assert not np.allclose(flat(first), flat(draw(1, jnp.int32(5))[0]))


@pytest.mark.parametrize(("name", "method"), [*((name, sam) for name in ASCENTS), ("momentum", crsam)])
def test_broken_and_zero_gradients_pass_through(name, method):
    problem = polynomial(True)
    tx = method(problem.loss, RHO, ascent=ASCENTS[name]())
    state, update = tx.init(problem.params), jax.jit(tx.update)
    _, state = update(jax.grad(problem.loss)(problem.params), state, problem.params)
    before = int(state.diagnostics.guarded_steps)
    for value in (np.nan, np.inf):
        grads = {**problem.params, "scale": jnp.array(value)}
        gradient, after = update(grads, state, problem.params)
        np.testing.assert_array_equal(flat(gradient), flat(grads))
        assert after.diagnostics.guarded_steps == before + 1
    gradient, after = update(jax.tree.map(jnp.zeros_like, problem.params), state, problem.params)
    assert np.all(np.isfinite(flat(gradient)))
    assert np.all(np.isfinite(flat(after)))


def test_rsam_whose_smoothed_gradient_is_broken_gives_g():
    problem = polynomial(True)
    g = jax.grad(problem.loss)(problem.params)
    broken = broken_at(problem.loss, lambda p: jnp.abs(problem.loss(p) - problem.loss(problem.params)) > 1e-9)
    tx = rsam(broken, RHO)
    gradient, state = tx.update(g, tx.init(problem.params), problem.params)
    np.testing.assert_array_equal(flat(gradient), flat(g))
    assert state.diagnostics.guarded_steps == 1


@pytest.mark.parametrize("name", ASCENTS)
def test_state_contract(name):
    """One compilation with donation; scan is the loop; strong types and structure stay; memories count as params."""
    problem = polynomial(True)
    tx = optax.chain(sam(problem.loss, RHO, ascent=ASCENTS[name]()), optax.sgd(0.02))

    def step(carry, _=None):
        params, state = carry
        updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    signature = lambda state: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    start = lambda: (jax.tree.map(lambda p: jnp.array(np.asarray(p)), problem.params), tx.init(problem.params))
    carry, jitted = start(), jax.jit(step, donate_argnums=0)
    before = signature(carry[1])
    assert not any(x.weak_type for x in jax.tree.leaves(carry[1]))
    for _ in range(5):
        carry, _ = jitted(carry)
    assert jitted._cache_size() == 1
    assert signature(carry[1]) == before
    close(flat(jax.lax.scan(step, start(), None, 5)[0]), flat(carry))
    mapped = optax.tree_map_params(tx, lambda x: x, start()[1], transform_non_params=lambda x: None)
    with_memory = name in ("momentum", "friendly", "dynamic")
    assert len(jax.tree.leaves(mapped)) == 3 * with_memory


def test_inject_hyperparams_with_only_loss_fn_static():
    problem = polynomial(True)
    options = {"rho": RHO, "sigma": 0.2, "weight": 0.5, "seed": 3}
    expected, _ = one_step(rsam(problem.loss, **options), problem.loss, problem.params)
    injected = optax.inject_hyperparams(rsam, static_args="loss_fn")(problem.loss, **options)
    grads, state = jax.grad(problem.loss)(problem.params), injected.init(problem.params)
    found, after = jax.jit(injected.update)(grads, state, problem.params)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    state.hyperparams["sigma"] = jnp.zeros(())
    plain, _ = one_step(sam(problem.loss, RHO), problem.loss, problem.params)
    np.testing.assert_allclose(flat(injected.update(grads, state, problem.params)[0]), flat(plain), rtol=1e-6)


def test_inject_hyperparams_takes_ascents_and_random_probes():
    problem = polynomial(True)
    options = {"rho": RHO, "ascent": friendly_ascent(), "probes": random_probes(2)}
    expected, _ = one_step(crsam(problem.loss, **options), problem.loss, problem.params)
    injected = optax.inject_hyperparams(crsam, static_args="loss_fn")(problem.loss, **options)
    grads, state = jax.grad(problem.loss)(problem.params), injected.init(problem.params)
    np.testing.assert_allclose(flat(injected.update(grads, state, problem.params)[0]), flat(expected), rtol=1e-6)
    assert {"rho", "alpha", "beta", "offset"} == set(state.hyperparams)


# Composition


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    "ascent",
    [
        friendly_ascent(),
        adaptive_ascent(),
        dropped_ascent(),
        masked_ascent(smoothed_ascent(), {"kernel": True, "bias": True, "scale": False}),
    ],
    ids=["friendly", "adaptive", "dropped", "masked smoothed"],
)
def test_crsam_takes_any_ascent_and_any_probes(ascent, random):
    """Its result is g⁺ at w + ρv, with v from the ascent, plus a penalty of the stated size along v or elsewhere."""
    problem = polynomial(True)
    g, unravel = jax.grad(problem.loss)(problem.params), ravel_pytree(problem.params)[1]
    v, _ = ascent.apply(g, ascent.init(problem.params), problem.params, jax.grad(problem.loss))
    at = lambda t: (
        float(problem.loss(unravel(flat(problem.params) + t * flat(v)))),
        flat(jax.grad(problem.loss)(unravel(flat(problem.params) + t * flat(v)))),
    )
    (loss, g), (loss_plus, g_plus), (loss_minus, g_minus) = at(0), at(RHO), at(-RHO)
    probes = random_probes(2) if random else None
    tx = crsam(problem.loss, RHO, 0.5, 0.2, ascent=ascent, probes=probes, max_penalty_ratio=1e6)
    gradient, found = one_step(tx, problem.loss, problem.params)
    penalty = flat(gradient) - g_plus
    close(np.linalg.norm(penalty) / np.linalg.norm(g_plus), found.penalty_ratio)
    if random:
        other, _ = one_step(crsam(problem.loss, RHO, 0.5, 0.2, probes=probes), problem.loss, problem.params)
        plain, _ = one_step(sam(problem.loss, RHO), problem.loss, problem.params)
        close(penalty, flat(other) - flat(plain))  # which does not depend on v
    else:
        s, d = loss_plus + loss_minus - 2 * loss, loss_plus - loss_minus
        close(penalty, 0.5 * (g_plus + g_minus - 2 * g) / (1 + s) + 0.2 * (g_plus - g_minus) / (1 + d))


def test_bad_arguments():
    for make, error, match in (
        (lambda: smoothed_ascent(sigma=-1.0), ValueError, "sigma"),
        (lambda: rsam(jnp.sum, seed=1.5), TypeError, "seed"),
        (lambda: dropped_ascent(keep=0.0), ValueError, "keep"),
        (lambda: dropped_ascent(keep=1.5), ValueError, "keep"),
        (lambda: momentum_ascent(decay=1.0), ValueError, "decay"),
        (lambda: friendly_ascent(sigma=np.inf), ValueError, "sigma"),
        (lambda: friendly_ascent(decay=-0.1), ValueError, "decay"),
        (lambda: sparse_ascent(np.ones(2)), TypeError, "bool"),
        (lambda: largest_fraction(jnp.ones(2), 1.5), ValueError, "fraction"),
        (lambda: dynamic_sparse_ascent(sparsity=1.0), ValueError, "sparsity"),
        (lambda: dynamic_sparse_ascent(drop=2.0), ValueError, "drop"),
        (lambda: dynamic_sparse_ascent(update_every=0), ValueError, "update_every"),
        (lambda: dynamic_sparse_ascent(total_steps=1.5), TypeError, "total_steps"),
        (lambda: sam(jnp.sum, ascent=gradient_ascent), TypeError, "call it to make one"),
    ):
        with pytest.raises(error, match=match):
            make()


@pytest.mark.parametrize("name", ASCENTS)
@pytest.mark.parametrize("params", [{}, (), {"a": jnp.zeros((0, 3))}, {"a": jnp.zeros(0), "b": jnp.ones(2), "c": {}}])
def test_trees_without_elements_and_empty_leaves_work(name, params):
    loss_fn = lambda p: sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)), jnp.zeros(()))
    ascent = ASCENTS[name]() if name != "sparse" else sparse_ascent(jax.tree.map(lambda p: p > 0, params))
    tx = sam(loss_fn, RHO, ascent=ascent)
    state = tx.init(params)
    for _ in range(2):
        gradient, state = tx.update(jax.grad(loss_fn)(params), state, params)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
        assert np.all(np.isfinite(flat(gradient)))
