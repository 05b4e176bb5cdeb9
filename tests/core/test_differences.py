"""S and D from gradients: exact on quadratics, of known order elsewhere, and blind to the rounding of the loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import crsam
from crsam_jax.ascents import adaptive_ascent
from tests.core.problems import broken_at, flat, mlp, mlp_loss, one_step, polynomial

pytestmark = pytest.mark.usefixtures("x64")

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"offset": 0.0}, {}, {"penalty": "linear"}, {"ascent": adaptive_ascent(0.2)}])
def test_on_quadratics_they_are_the_differences_of_losses(options):
    problem = polynomial(False)
    found, expected = (
        one_step(crsam(problem.loss, 0.3, 0.5, 0.2, differences=name, **options), problem.loss, problem.params)
        for name in ("gradients", "losses")
    )
    close(flat(found), flat(expected))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_closed_form_on_cubics(offset):
    """S̃ = S is exact still; D̃ = 2ρ⟨v, g⟩ + ρ³ Σ t v³, where D has a third of the second term."""
    problem, rho = polynomial(True), 0.7
    g = flat(jax.grad(problem.loss)(problem.params))
    v = g / np.linalg.norm(g)
    bend, second = rho * problem.hessian_at(problem.params) @ v, rho**2 * problem.cubic * v**2
    s, d = rho * v @ bend, 2 * rho * v @ g + rho**3 * np.sum(problem.cubic * v**3)
    tx = crsam(problem.loss, rho, 0.5, 0.2, offset=offset, differences="gradients")
    gradient, found = one_step(tx, problem.loss, problem.params)
    close(flat(gradient), g + bend + second / 2 + 0.5 * second / (offset + s) + 0.2 * 2 * bend / (offset + d))
    close(found.curvature, s / rho**2)
    close(found.normalized_curvature, s / rho**2 / np.linalg.norm(g))
    close(found.slope, d / (2 * rho))
    assert found.guarded_steps == 0


def test_errors_are_of_fourth_and_third_order():
    """S̃ − S = ρ⁴/12 L⁗ and D̃ − D = 2ρ³/3 L‴ to leading order, L the loss along v."""
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    grads = jax.grad(loss_fn)(params, batch)
    v = jax.tree.map(lambda g: g / np.linalg.norm(flat(grads)), grads)
    along = lambda t: loss_fn(jax.tree.map(lambda w, d: w + t * d, params, v), batch)
    third = jax.grad(jax.grad(jax.grad(along)))
    third_derivative, fourth_derivative = (float(jax.jit(f)(0.0)) for f in (third, jax.grad(third)))
    for rho in (0.04, 0.02):
        found, exact = (
            one_step(crsam(loss_fn, rho, differences=name), loss_fn, params, batch=batch)[1]
            for name in ("gradients", "losses")
        )
        s_error, d_error = (found.curvature - exact.curvature) * rho**2, 2 * rho * (found.slope - exact.slope)
        assert float(s_error / rho**4) == pytest.approx(fourth_derivative / 12, rel=0.02)
        assert float(d_error / rho**3) == pytest.approx(third_derivative * 2 / 3, rel=0.02)


def compiled(loss_fn, **options):
    """A jitted step: (params, batch) -> gradient and diagnostics."""
    return jax.jit(lambda params, batch: one_step(crsam(loss_fn, 0.1, **options), loss_fn, params, batch=batch))


def relative_errors(loss_fn):
    """Errors of the penalty's gradient and of the curvature in float32, against the exact loss in float64.

    The medians over problems, from gradients and from losses.
    """
    weights = {"alpha": 0.5, "beta": 0.2, "offset": 0.01}
    reference, sam = compiled(mlp_loss, **weights), compiled(mlp_loss, alpha=0.0, beta=0.0)
    steps = [compiled(loss_fn, **weights, differences=name) for name in ("gradients", "losses")]
    errors = []
    for seed in range(5):
        _, params, batch = mlp(seed, dtype=jnp.float64)
        exact, truth = reference(params, batch)
        penalty = flat(exact) - flat(sam(params, batch)[0])
        _, params, batch = mlp(seed)
        with jax.enable_x64(False):
            results = [step(params, batch) for step in steps]
        errors.append(
            [
                [np.linalg.norm(flat(gradient) - flat(exact)) / np.linalg.norm(penalty) for gradient, _ in results],
                [abs(float(found.curvature) / float(truth.curvature) - 1) for _, found in results],
            ]
        )
    return np.median(errors, axis=0)


def test_they_survive_a_loss_rounded_to_bfloat16():
    """Where only the loss is rounded, its gradients are not."""
    rounded = lambda params, batch: mlp_loss(params, batch).astype(jnp.bfloat16)
    (good_penalty, bad_penalty), (good_curvature, bad_curvature) = relative_errors(rounded)
    assert max(good_penalty, good_curvature) < 0.01
    assert min(bad_penalty, bad_curvature) > 0.5


def test_their_curvature_survives_a_network_computed_in_bfloat16():
    """The penalty's gradient does not: it is a small difference of gradients that are rounded themselves."""

    def half(params, batch):
        (x, labels), params = batch, optax.tree.cast(params, jnp.bfloat16)
        return mlp_loss(params, (x.astype(jnp.bfloat16), labels))

    _, (good, bad) = relative_errors(half)
    assert good < 0.05
    assert bad > 0.2


def test_a_concave_direction_leaves_the_logarithm_out_and_counts():
    problem = polynomial(False)
    problem = problem._replace(hessian=-problem.hessian, linear=20 * problem.linear)
    run = lambda alpha: one_step(
        crsam(problem.loss, 0.1, alpha, 0.2, offset=0.0, differences="gradients"), problem.loss, problem.params
    )
    (with_alpha, counted), (without, uncounted) = run(0.5), run(0.0)
    np.testing.assert_array_equal(flat(with_alpha), flat(without))
    assert counted.curvature < 0
    assert (counted.guarded_steps, uncounted.guarded_steps) == (1, 0)


def test_a_broken_minus_probe_gives_sam():
    square = lambda w: 0.5 * jnp.sum(w**2)
    loss_fn, w = broken_at(square, lambda p: jnp.linalg.norm(p) < 4.95), jnp.array([3.0, 4.0])
    gradient, found = one_step(crsam(loss_fn, 0.1, differences="gradients"), loss_fn, w)
    close(gradient, w * 1.02)
    assert found.guarded_steps == 1


def test_an_unknown_name_is_rejected():
    with pytest.raises(ValueError, match="differences must be one of 'losses', 'gradients'"):
        crsam(jnp.sum, differences="gradient")
