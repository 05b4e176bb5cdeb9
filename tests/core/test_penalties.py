"""What to make of it: closed forms on polynomials, autodiff of the objective, an independent reference in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from crsam_jax import asam, crsam, crsam_gradient, gradient_norm_penalty, gsam, sam, wsam
from crsam_jax.engine import second_difference
from tests.core.problems import closed_form, flat, mlp, one_step, polynomial

pytestmark = pytest.mark.usefixtures("x64")

RHOS = (0.05, 0.1, 0.7)
PROBLEMS = [pytest.param(False, id="quadratic"), pytest.param(True, id="cubic")]
close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


# Closed forms


@pytest.mark.parametrize("cubic", PROBLEMS)
@pytest.mark.parametrize("rho", RHOS)
def test_sam_is_the_gradient_at_the_perturbed_point(cubic, rho):
    problem = polynomial(cubic)
    gradient, _ = one_step(sam(problem.loss, rho), problem.loss, problem.params)
    close(flat(gradient), closed_form(problem, rho)[2])


@pytest.mark.parametrize("cubic", PROBLEMS)
@pytest.mark.parametrize("rho", RHOS)
def test_linear_form_is_the_released_code(cubic, rho):
    problem = polynomial(cubic)
    _, _, g_plus, difference, second, _, _ = closed_form(problem, rho)
    gradient, _ = one_step(crsam(problem.loss, rho, 0.5, 0.2, penalty="linear"), problem.loss, problem.params)
    close(flat(gradient), g_plus + 0.5 * second + 0.2 * difference)


@pytest.mark.parametrize("cubic", PROBLEMS)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("offset", [0.0, 0.1, 1.0])
def test_log_form_divides_by_the_offset_differences(cubic, rho, offset):
    problem = polynomial(cubic)
    _, _, g_plus, difference, second, s, d = closed_form(problem, rho)
    gradient, diagnostics = one_step(crsam(problem.loss, rho, 0.5, 0.2, offset=offset), problem.loss, problem.params)
    assert diagnostics.guarded_steps == 0
    close(flat(gradient), g_plus + 0.5 * second / (offset + s) + 0.2 * difference / (offset + d))


@pytest.mark.parametrize("penalty", ["log", "linear"])
@pytest.mark.parametrize("bound", [0.0, 0.01, 0.3])
def test_bound_scales_the_penalty_to_the_ratio_and_keeps_its_direction(penalty, bound):
    problem, rho = polynomial(True), 0.3
    _, _, g_plus, *_ = closed_form(problem, rho)
    options = {"penalty": penalty, "offset": 0.0}
    free, seen = one_step(crsam(problem.loss, rho, 9.0, 9.0, **options), problem.loss, problem.params)
    tx = crsam(problem.loss, rho, 9.0, 9.0, max_penalty_ratio=bound, **options)
    bounded, found = one_step(tx, problem.loss, problem.params)
    term = flat(free) - g_plus
    assert seen.penalty_ratio > 0.3
    close(found.penalty_ratio, np.linalg.norm(term) / np.linalg.norm(g_plus))  # before the bound
    close(flat(bounded) - g_plus, bound * np.linalg.norm(g_plus) * term / np.linalg.norm(term))
    assert found.bounded_steps == 1
    assert found.guarded_steps == 0


def test_bound_leaves_a_smaller_penalty_alone():
    problem = polynomial(True)
    free, seen = one_step(crsam(problem.loss), problem.loss, problem.params)
    bound = 1.01 * float(seen.penalty_ratio)
    bounded, found = one_step(crsam(problem.loss, max_penalty_ratio=bound), problem.loss, problem.params)
    np.testing.assert_array_equal(flat(bounded), flat(free))
    assert found.bounded_steps == 0


# Autodiff of the objective, with v held constant, on a network


def objective(loss, v, rho, alpha, beta, offset, penalty):
    def value(w):
        shifted = lambda sign: loss(jax.tree.map(lambda x, d: x + sign * rho * d, w, v))
        s, d = shifted(1) + shifted(-1) - 2 * loss(w), shifted(1) - shifted(-1)
        log = jnp.log if penalty == "log" else (lambda x: x)
        return shifted(1) + alpha * log(offset + s) + beta * log(offset + d)

    return value


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("penalty", ["log", "linear"])
def test_gradient_is_autodiff_of_the_objective_with_v_held_constant(offset, penalty):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    loss = lambda w: loss_fn(w, batch)
    grads = jax.grad(loss)(params)
    v = jax.tree.map(lambda g: g / np.linalg.norm(flat(grads)), grads)
    tx = crsam(loss_fn, 0.2, 0.3, 0.05, penalty=penalty, offset=offset)
    gradient, diagnostics = one_step(tx, loss_fn, params, batch=batch)
    expected = jax.grad(objective(loss, v, 0.2, 0.3, 0.05, offset, penalty))(params)
    assert diagnostics.guarded_steps == 0
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-9, atol=1e-11)


# An independent reference, on flat vectors in numpy


def numpy_reference(name, loss, gradient, w):
    """The gradient of a method at its defaults, from plain functions of a flat vector."""
    rho = {"asam": 0.5, "crsam": 0.1, "crsam_linear": 0.1, "gradient_norm_penalty": 0.1}.get(name, 0.05)
    g = gradient(w)
    scale = np.abs(w) + 0.01 if name == "asam" else np.ones_like(w)
    e = rho * scale**2 * g / np.sqrt(np.sum((scale * g) ** 2))
    gp, gm = gradient(w + e), gradient(w - e)
    s, d = loss(w + e) + loss(w - e) - 2 * loss(w), loss(w + e) - loss(w - e)
    return {
        "sam": gp,
        "asam": gp,
        "wsam": g + 9 * (gp - g),
        "gsam": gp - 0.4 * (g - np.dot(g, gp) * gp / np.dot(gp, gp)),
        "gradient_norm_penalty": 0.2 * g + 0.8 * gp,
        "crsam": gp + 0.1 * (gp + gm - 2 * g) / (1 + s) + 0.01 * (gp - gm) / (1 + d),
        "crsam_linear": gp + 0.1 * (gp + gm - 2 * g) + 0.01 * (gp - gm),
    }[name]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("sam", sam),
        ("asam", asam),
        ("wsam", wsam),
        ("gsam", gsam),
        ("gradient_norm_penalty", gradient_norm_penalty),
        ("crsam", crsam),
        ("crsam_linear", partial(crsam, penalty="linear")),
    ],
)
def test_members_at_their_defaults_agree_with_numpy(name, method, jit):
    loss_fn, params, batch = mlp(seed=1, dtype=jnp.float64)
    w, unravel = ravel_pytree(params)
    loss = lambda w: float(loss_fn(unravel(w), batch))
    gradient = lambda w: flat(jax.grad(loss_fn)(unravel(w), batch))
    step = partial(one_step, method(loss_fn), loss_fn)
    found, _ = (jax.jit(step) if jit else step)(params, batch=batch)
    np.testing.assert_allclose(flat(found), numpy_reference(name, loss, gradient, np.asarray(w)), rtol=1e-9, atol=1e-12)


def test_gsam_takes_away_only_the_part_of_g_orthogonal_to_g_plus():
    problem = polynomial(True)
    g_plus = closed_form(problem, 0.3)[2]
    gradient, _ = one_step(gsam(problem.loss, 0.3, 0.7), problem.loss, problem.params)
    close((flat(gradient) - g_plus) @ g_plus, 0)
    assert np.linalg.norm(flat(gradient) - g_plus) > 1e-3


def test_linear_form_at_alpha_equal_beta_does_not_depend_on_the_minus_probe():
    """The loss is bent on the far side of the probe at w − ρv alone, and the result stays."""
    plain = lambda w: jnp.sum(w**3) / 3
    bent = lambda w: plain(w) + jnp.where(jnp.sum(w) < 3, jnp.sum(jnp.sin(5 * w)), 0.0)
    w = jnp.array([1.0, 2.0])
    for alpha, beta, same in ((0.3, 0.3, True), (0.3, 0.1, False)):
        results = [one_step(crsam(f, 0.1, alpha, beta, penalty="linear"), plain, w)[0] for f in (plain, bent)]
        assert np.allclose(*results, rtol=1e-12) == same


def test_second_difference_subtracts_nearly_equal_numbers_first():
    loss, plus, minus = (jnp.float32(x) for x in (16777216.0, 16777218.0, 16777218.0))
    assert second_difference(loss, plus, minus) == 4
    assert second_difference(jnp.float32(3e38), jnp.float32(3e38), jnp.float32(3e38)) == 0


def test_mask_perturbs_a_part_and_returns_the_gradient_of_all():
    problem = polynomial(False)
    mask = {"kernel": True, "bias": False, "scale": False}
    g = jax.grad(problem.loss)(problem.params)
    v = flat({k: g[k] / np.linalg.norm(flat(g["kernel"])) if mask[k] else 0 * g[k] for k in g})
    gradient, found = one_step(crsam(problem.loss, 0.4, 0.0, 0.0, mask=mask), problem.loss, problem.params)
    close(flat(gradient), flat(g) + 0.4 * problem.hessian @ v)
    close(found.curvature, v @ problem.hessian @ v)
    close(found.grad_norm, np.linalg.norm(flat(g)))


def test_pure_function_equals_the_transformation_and_computes_the_gradient_if_not_given():
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    options = {"rho": 0.2, "alpha": 0.3, "beta": 0.1, "offset": 0.0, "max_penalty_ratio": 0.5}
    expected = one_step(crsam(loss_fn, **options), loss_fn, params, batch=batch)
    gradient_fn = crsam_gradient(loss_fn, **options)
    grads = jax.grad(loss_fn)(params, batch)
    for found in (gradient_fn(params, batch=batch), gradient_fn(params, grads, batch=batch)):
        np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-12)
