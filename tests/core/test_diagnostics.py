"""What the state says about a step, in closed form on polynomials."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from crsam_jax import asam, crsam, gradient_norm_penalty, gsam, sam, wsam
from crsam_jax.ascents import adaptive_ascent
from tests.core.problems import closed_form, direction_and_gradient, flat, one_step, polynomial

pytestmark = pytest.mark.usefixtures("x64")

RHOS = (0.05, 0.1, 0.7)
PROBLEMS = [pytest.param(False, id="quadratic"), pytest.param(True, id="cubic")]
close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cubic", PROBLEMS)
@pytest.mark.parametrize("rho", RHOS)
def test_diagnostics_of_two_sided_methods(cubic, rho):
    problem = polynomial(cubic)
    v, g, g_plus, difference, second, s, d = closed_form(problem, rho)
    gradient, found = one_step(crsam(problem.loss, rho, 0.5, 0.2, max_penalty_ratio=1e3), problem.loss, problem.params)
    at = lambda length: float(problem.loss(ravel_pytree(problem.params)[1](flat(problem.params) + length * v)))
    penalty = 0.5 * second / (1 + s) + 0.2 * difference / (1 + d)
    cosine = g @ flat(gradient) / np.linalg.norm(g) / np.linalg.norm(flat(gradient))
    expected = {
        "loss": at(0),
        "loss_plus": at(rho),
        "loss_minus": at(-rho),
        "grad_norm": np.linalg.norm(g),
        "cosine": cosine,
        "slope": d / (2 * rho),
        "curvature": s / rho**2,
        "normalized_curvature": s / rho**2 / np.linalg.norm(g),
        "penalty_ratio": np.linalg.norm(penalty) / np.linalg.norm(g_plus),
        "guarded_steps": 0,
        "bounded_steps": 0,
        "mismatched_steps": 0,
    }
    assert set(expected) == set(found._fields)
    for name, value in found._asdict().items():
        close(value, expected[name], err_msg=name)


@pytest.mark.parametrize("method", [sam, wsam, gsam, gradient_norm_penalty])
@pytest.mark.parametrize("cubic", PROBLEMS)
def test_diagnostics_of_one_sided_methods(method, cubic):
    problem, rho = polynomial(cubic), 0.1
    v, g, g_plus, *_ = closed_form(problem, rho)
    gradient, found = one_step(method(problem.loss, rho=rho), problem.loss, problem.params)
    expected = {
        "loss": float(problem.loss(problem.params)),
        "loss_plus": float(problem.loss(ravel_pytree(problem.params)[1](flat(problem.params) + rho * v))),
        "grad_norm": np.linalg.norm(g),
        "cosine": g @ flat(gradient) / np.linalg.norm(g) / np.linalg.norm(flat(gradient)),
        "curvature": v @ (g_plus - g) / rho,
        "guarded_steps": 0,
        "mismatched_steps": 0,
    }
    assert set(expected) == set(found._fields)
    for name, value in found._asdict().items():
        close(value, expected[name], err_msg=name)


@pytest.mark.parametrize("two_sided", [False, True])
def test_with_asam_diagnostics_are_per_unit_of_the_perturbations_length(two_sided):
    """On a quadratic, slope = vᵀg/‖v‖ and curvature = vᵀHv/‖v‖² whatever the length of v."""
    problem, rho, eta = polynomial(False), 0.3, 0.2
    _, g = direction_and_gradient(problem)
    scale = np.abs(flat(problem.params)) + eta
    v = scale**2 * g / np.linalg.norm(scale * g)
    assert abs(np.linalg.norm(v) - 1) > 0.1
    unit = v / np.linalg.norm(v)
    tx = crsam(problem.loss, rho, 0.0, 0.0, ascent=adaptive_ascent(eta)) if two_sided else asam(problem.loss, rho, eta)
    gradient, found = one_step(tx, problem.loss, problem.params)
    close(flat(gradient), g + rho * problem.hessian @ v)
    close(found.curvature, unit @ problem.hessian @ unit)
    if two_sided:
        close(found.slope, unit @ g)
        close(found.normalized_curvature, unit @ problem.hessian @ unit / np.linalg.norm(g))


def test_curvature_of_one_sided_methods_does_not_cancel():
    """In float32, with ‖g‖ large beside the change of the gradient along v."""
    n, rho = 4096, 1e-3
    with jax.enable_x64(False):
        loss_fn = lambda w: 0.5 * jnp.sum(w**2) + 30 * jnp.sum(w)
        params = jnp.asarray(np.random.default_rng(0).normal(size=n), jnp.float32)
        _, found = one_step(sam(loss_fn, rho), loss_fn, params)
        assert found.curvature.dtype == jnp.float32
    assert float(found.curvature) == pytest.approx(1, rel=1e-2)
