"""Random probes: where they lie, closed forms, autodiff of the stated penalty, the trace, guards."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from crsam_jax import Execution, crsam, crsam_gradient, random_probes, sam
from crsam_jax.ascents import smoothed_ascent
from tests.core.problems import broken_at, flat, mlp, one_step, polynomial, recording

pytestmark = pytest.mark.usefixtures("x64")

RHO, RADIUS = 0.3, 0.5
close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)


def step_at(tx, loss_fn, params, count=0, **kwargs):
    """One step with ``count`` steps before it: gradient and diagnostics."""
    state = tx.init(params)._replace(step_count=jnp.asarray(count, jnp.int32))
    gradient, state = tx.update(jax.grad(loss_fn)(params, **kwargs), state, params, **kwargs)
    return gradient, state.diagnostics


def probed(problem, probes, count=0, **options):
    """The unit directions u of the pairs w ± r u at which one step evaluated the loss, [k, n]."""
    loss_fn, points = recording(problem.loss)
    step_at(
        crsam(loss_fn, RHO, probes=probes, execution=Execution("sequential"), **options),
        problem.loss,
        problem.params,
        count,
    )
    jax.effects_barrier()
    offsets = np.array(points) - flat(problem.params)
    offsets = offsets[np.isclose(np.linalg.norm(offsets, axis=1), probes.radius)]
    assert len(points) == 2 + 2 * probes.k  # w, w + ρv and the pairs
    assert len(offsets) == 2 * probes.k
    firsts = []
    for u in offsets / probes.radius:
        matches = [i for i, first in enumerate(firsts) if np.allclose(u, -first)]
        if not matches:
            firsts.append(u)
    assert len(firsts) == probes.k  # so the others are their mirror images
    return np.array(firsts)


def test_directions_depend_on_seed_and_step_alone():
    problem = polynomial(True)
    probes = random_probes(3, RADIUS, seed=4)
    first = probed(problem, probes, count=2)
    np.testing.assert_array_equal(first, probed(polynomial(True), probes, count=2))
    np.testing.assert_array_equal(first, probed(problem, probes, count=2, alpha=0.9))
    everything = [first, probed(problem, probes, count=3), probed(problem, random_probes(3, RADIUS, seed=5), count=2)]
    overlaps = np.abs(np.concatenate(everything) @ np.concatenate(everything).T)
    assert np.all(overlaps - np.eye(9) < 1 - 1e-6)  # no direction comes twice


def test_a_noisy_ascent_with_the_same_seed_looks_elsewhere():
    """Its v is the unit noise where the gradient is zero; each u is a draw of its own."""
    problem = polynomial(True)
    ascent = smoothed_ascent(sigma=1.0, weight=0.0, seed=4)
    ones = jax.tree.map(jnp.ones_like, problem.params)
    noise, _ = ascent.apply(ones, ascent.init(ones), ones, lambda _: ones)
    overlaps = np.abs(probed(problem, random_probes(3, RADIUS, seed=4)) @ flat(noise))
    assert np.all(overlaps < 1 - 1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_and_diagnostics_agree_with_numpy(k, offset):
    """On a cubic g± = g ± rHu + ½r² t u², in closed form."""
    problem, probes = polynomial(True), random_probes(k, RADIUS, seed=1)
    w, h = flat(problem.params), problem.hessian_at(problem.params)
    g = flat(jax.grad(problem.loss)(problem.params))
    v = g / np.linalg.norm(g)
    g_plus = g + RHO * h @ v + RHO**2 * problem.cubic * v**2 / 2
    second, first, seconds, squares = 0, 0, 0, 0
    for u in probed(problem, probes, alpha=0.5, beta=0.2, offset=offset):
        s = RADIUS**2 * u @ h @ u
        d = 2 * RADIUS * u @ g + RADIUS**3 * np.sum(problem.cubic * u**3) / 3
        second, first = second + RADIUS**2 * problem.cubic * u**2, first + d * 2 * RADIUS * h @ u
        seconds, squares = seconds + s, squares + d**2
    penalty = 0.5 * second / (offset * k + seconds) + 0.2 * first / (offset * k + squares)
    tx = crsam(problem.loss, RHO, 0.5, 0.2, probes=probes, offset=offset)
    gradient, found = one_step(tx, problem.loss, problem.params)
    close(flat(gradient), g_plus + penalty)
    expected = {
        "loss": float(problem.loss(problem.params)),
        "grad_norm": np.linalg.norm(g),
        "cosine": g @ (g_plus + penalty) / np.linalg.norm(g) / np.linalg.norm(g_plus + penalty),
        "curvature": v @ (g_plus - g) / RHO,
        "trace": len(w) * seconds / k / RADIUS**2,
        "normalized_trace": len(w) * seconds / k / RADIUS**2 / np.linalg.norm(g),
        "penalty_ratio": np.linalg.norm(penalty) / np.linalg.norm(g_plus),
        "guarded_steps": 0,
        "bounded_steps": 0,
        "mismatched_steps": 0,
    }
    assert set(expected) | {"loss_plus"} == set(found._fields)
    for name, value in expected.items():
        close(getattr(found, name), value, err_msg=name)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_gradient_is_autodiff_of_the_stated_penalty_with_directions_held_constant(offset):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    w, unravel = ravel_pytree(params)
    value = lambda x: loss_fn(unravel(x), batch)
    probes = random_probes(2, RADIUS, seed=3)
    directions = probed(SimpleNamespace(loss=partial(loss_fn, batch=batch), params=params), probes)
    v = flat(jax.grad(value)(w))
    v = v / np.linalg.norm(v)

    def objective(x):
        s = jnp.mean(jnp.array([value(x + RADIUS * u) + value(x - RADIUS * u) - 2 * value(x) for u in directions]))
        d = jnp.array([value(x + RADIUS * u) - value(x - RADIUS * u) for u in directions])
        return value(x + RHO * v) + 0.3 * jnp.log(offset + s) + 0.05 / 2 * jnp.log(offset + jnp.mean(d**2))

    tx = crsam(loss_fn, RHO, 0.3, 0.05, probes=probes, offset=offset)
    gradient, found = one_step(tx, loss_fn, params, batch=batch)
    assert found.guarded_steps == 0
    close(flat(gradient), flat(jax.grad(objective)(w)))


# The trace


@pytest.mark.parametrize(("k", "radius"), [(1, 0.1), (4, 3.0)])
def test_trace_is_exact_where_all_directions_are_alike(k, radius):
    """For H = cI every uᵀHu is c."""
    loss_fn = lambda w: 1.5 * jnp.sum(w["a"] ** 2) + 1.5 * jnp.sum(w["b"] ** 2) + jnp.sum(w["a"])
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(5)}
    _, found = one_step(crsam(loss_fn, probes=random_probes(k, radius)), loss_fn, params)
    close(found.trace, 3 * 11)
    _, found = one_step(crsam(loss_fn, probes=random_probes(k, radius), mask={"a": False, "b": True}), loss_fn, params)
    close(found.trace, 3 * 5)


def test_trace_has_the_mean_and_the_variance_of_uniform_directions():
    """E n uᵀHu = Tr H and Var = 2n/(n+2) (Tr H² − (Tr H)²/n), over many steps; a Gaussian u would have more."""
    problem, draws = polynomial(False), 4000
    h, n = problem.hessian, 6
    tx = crsam(problem.loss, RHO, probes=random_probes(1, RADIUS), execution=Execution("sequential"))
    estimate = lambda count: step_at(tx, problem.loss, problem.params, count)[1].trace
    traces = np.asarray(jax.jit(jax.vmap(estimate))(jnp.arange(draws)))
    variance = 2 * n / (n + 2) * (np.trace(h @ h) - np.trace(h) ** 2 / n)
    assert abs(traces.mean() - np.trace(h)) < 4 * np.sqrt(variance / draws)
    assert np.var(traces) == pytest.approx(variance, rel=0.15)


# Reductions, strategies, masks


@pytest.mark.parametrize("options", [{"alpha": 0.0, "beta": 0.0}, {"max_penalty_ratio": 0.0}])
def test_without_penalty_it_is_sam(options):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    found, diagnostics = one_step(crsam(loss_fn, RHO, probes=random_probes(2), **options), loss_fn, params, batch=batch)
    expected, _ = one_step(sam(loss_fn, RHO), loss_fn, params, batch=batch)
    close(flat(found), flat(expected))
    assert diagnostics.guarded_steps == 0


def test_rho_of_zero_gives_g():
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    found, _ = one_step(crsam(loss_fn, 0.0, probes=random_probes(2)), loss_fn, params, batch=batch)
    np.testing.assert_array_equal(flat(found), flat(jax.grad(loss_fn)(params, batch)))


def test_the_bound_scales_the_penalty_alone():
    problem = polynomial(True)
    results = []
    for options in ({"alpha": 0.0, "beta": 0.0}, {}, {"max_penalty_ratio": 0.01}):
        options = {"alpha": 5.0, "beta": 5.0, **options}
        results.append(
            one_step(crsam(problem.loss, RHO, probes=random_probes(2), **options), problem.loss, problem.params)
        )
    (plus, _), (free, _), (bounded, found) = results
    term = flat(free) - flat(plus)
    close(flat(bounded) - flat(plus), 0.01 * np.linalg.norm(flat(plus)) * term / np.linalg.norm(term))
    assert found.bounded_steps == 1


def test_all_pairs_go_through_the_same_strategies():
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    results = [
        one_step(
            crsam(loss_fn, RHO, probes=random_probes(2), execution=Execution(evaluation)), loss_fn, params, batch=batch
        )
        for evaluation in ("auto", "sequential", "ordered", "vmap")
    ]
    for result in results[1:]:
        close(flat(result), flat(results[0]))


def test_probes_stay_inside_the_mask():
    problem = polynomial(True)
    mask = {"kernel": True, "bias": False, "scale": False}
    inside = flat(jax.tree.map(lambda is_in, p: np.full(np.shape(p), is_in), mask, problem.params)).astype(bool)
    directions = probed(problem, random_probes(3, RADIUS), mask=mask)
    assert np.all(directions[:, ~inside] == 0)
    assert np.all(directions[:, inside] != 0)


def test_pure_function_takes_probes():
    problem, probes = polynomial(True), random_probes(2, RADIUS)
    gradient_fn = crsam_gradient(problem.loss, RHO, probes=probes)
    gradient, state = gradient_fn.step(problem.params, None, gradient_fn.init(problem.params))
    found = gradient, state.diagnostics
    close(flat(found), flat(one_step(crsam(problem.loss, RHO, probes=probes), problem.loss, problem.params)))


# Guards


def test_eq_7_switches_off_what_drowns_in_rounding():
    """With δ = 0 and a tiny radius S is noise, which is counted; D² is not, and its term stays."""
    problem = polynomial(True)
    term = lambda alpha, beta, radius: one_step(
        crsam(problem.loss, RHO, alpha, beta, offset=0.0, probes=random_probes(1, radius)), problem.loss, problem.params
    )
    plus = flat(one_step(sam(problem.loss, RHO), problem.loss, problem.params)[0])
    off, found = term(0.5, 0.0, 1e-9)
    np.testing.assert_array_equal(flat(off), plus)
    assert found.guarded_steps == 1
    on, found = term(0.0, 0.5, 1e-5)
    assert np.linalg.norm(flat(on) - plus) > 1e-3
    assert found.guarded_steps == 0


def test_a_negative_mean_curvature_leaves_that_term_out_alone():
    problem = polynomial(False)
    problem = problem._replace(hessian=-problem.hessian)
    run = lambda alpha: one_step(
        crsam(problem.loss, RHO, alpha, 0.2, offset=0.0, probes=random_probes(2)), problem.loss, problem.params
    )
    (with_alpha, counted), (without, uncounted) = run(0.5), run(0.0)
    np.testing.assert_array_equal(flat(with_alpha), flat(without))
    assert counted.trace < 0
    assert (counted.guarded_steps, uncounted.guarded_steps) == (1, 0)


def test_a_broken_probe_gives_sam_and_a_broken_or_zero_gradient_itself():
    square = lambda w: 0.5 * jnp.sum(w**2)
    w = jnp.array([3.0, 4.0])
    far = broken_at(square, lambda p: jnp.linalg.norm(p - w) > 0.6)
    tx = crsam(far, RHO, probes=random_probes(2, radius=1.0))
    gradient, found = one_step(tx, far, w)
    close(gradient, w * (1 + RHO / 5))
    assert found.guarded_steps == 1
    assert np.isfinite(found.penalty_ratio)
    tx = crsam(square, RHO, probes=random_probes(2))
    for grads in (jnp.array([jnp.nan, 1.0]), jnp.array([1.0, -jnp.inf]), jnp.zeros(2)):
        gradient, state = tx.update(grads, tx.init(w), w)
        np.testing.assert_array_equal(gradient, grads)
        assert state.diagnostics.guarded_steps == 1
        assert state.diagnostics.trace == 0


@pytest.mark.parametrize("options", [{"penalty": "linear"}, {"differences": "gradients"}])
def test_forms_without_a_meaning_are_rejected(options):
    with pytest.raises(ValueError, match="Random probes go with"):
        crsam(jnp.sum, probes=random_probes(), **options)


def test_bad_arguments():
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k must be an integer"):
            random_probes(k)
    for radius in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="radius must be"):
            random_probes(1, radius)
    with pytest.raises(TypeError, match="seed must be an integer"):
        random_probes(seed=0.5)
    with pytest.raises(TypeError, match="probes must be None"):
        crsam(jnp.sum, probes=random_probes)
