"""Sharpness against closed forms of quadratic and linear losses, and its invariance when adaptive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsam_jax import curvature
from tests.core.curvature_problems import cut, dense_case
from tests.core.problems import mlp_loss, polynomial


def relu_loss(params, batch):
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ params["first"]) @ params["second"] - y) ** 2)


def relu_case():
    rng = np.random.default_rng(0)
    params = {"first": jnp.asarray(rng.normal(size=(4, 6))), "second": jnp.asarray(rng.normal(size=(6, 2)))}
    batch = jnp.asarray(rng.normal(size=(16, 4))), jnp.asarray(rng.normal(size=(16, 2)))
    factors = jnp.asarray(np.exp(rng.normal(size=6)))
    rescaled = {"first": params["first"] * factors, "second": params["second"] / factors[:, None]}
    return params, rescaled, {"batch": batch}


@settings(max_examples=10, deadline=None)
@given(rho=st.floats(1e-3, 10), num_steps=st.integers(1, 7), seed=st.integers(0, 100))
def test_a_linear_loss_rises_by_rho_times_its_slope(rho, num_steps, seed):
    with jax.enable_x64(True):
        slope = jnp.asarray(np.random.default_rng(seed).normal(size=5))
        loss_fn = lambda w, slope: w @ slope
        data = {"slope": slope}
        result = curvature.worst_case_sharpness(loss_fn, jnp.ones(5), data, rho=rho, num_steps=num_steps)
        scaled = curvature.worst_case_sharpness(
            loss_fn, 3 * jnp.ones(5), data, rho=rho, num_steps=num_steps, adaptive=True
        )
    np.testing.assert_allclose(result.value, rho * np.linalg.norm(slope), rtol=1e-9)
    np.testing.assert_allclose(scaled.value, 3 * rho * np.linalg.norm(slope), rtol=1e-9)
    assert len(result.losses) == num_steps + 1


def test_one_step_is_the_perturbation_of_sam(x64):
    case, rho = dense_case(), 0.3
    result = curvature.worst_case_sharpness(mlp_loss, case.params, cut(case.batch, [10, 22]), rho=rho, num_steps=1)
    grads = jax.grad(mlp_loss)(case.params, case.batch)
    norm = np.linalg.norm(case.gradient)
    moved = jax.tree.map(lambda w, g: w + rho * g / norm, case.params, grads)
    np.testing.assert_allclose(
        result.value, mlp_loss(moved, case.batch) - mlp_loss(case.params, case.batch), rtol=1e-10
    )


def test_many_projected_steps_find_the_maximum_of_a_convex_quadratic(x64):
    """On the sphere the maximum of ½wᵀHw from w = 0⁺ is ρ²λ_max/2, which long steps with projection reach."""
    h = np.diag([4.0, 1.0, 0.5])
    loss_fn = lambda w: 0.5 * w @ h @ w
    start = 1e-9 * jnp.ones(3)
    result = curvature.worst_case_sharpness(loss_fn, start, rho=0.7, num_steps=60, step_size=0.3)
    np.testing.assert_allclose(result.value, 0.5 * 0.7**2 * 4.0, rtol=1e-6)
    assert result.value <= 0.5 * 0.7**2 * 4.0 * (1 + 1e-6)


def test_average_case_of_a_quadratic_is_half_sigma_squared_times_the_trace(x64):
    problem = polynomial(cubic=False)
    kwargs = {"sigma": 0.2, "key": jax.random.key(0), "num_probes": 300}
    result = curvature.average_sharpness(problem.loss, problem.params, **kwargs)
    np.testing.assert_allclose(result.loss, problem.loss(problem.params), rtol=1e-14)
    assert abs(result.mean - 0.02 * np.trace(problem.hessian)) < 4 * result.standard_error
    # Each probe is σ²/2 εᵀHε, of variance σ⁴/2 ‖H‖².
    np.testing.assert_allclose(
        result.standard_error, 0.04 * np.linalg.norm(problem.hessian) / np.sqrt(2 * 300), rtol=0.25
    )


def test_average_case_cancels_the_slope_exactly(x64):
    result = curvature.average_sharpness(
        lambda w: jnp.sum(w), jnp.zeros(4), sigma=1.0, key=jax.random.key(0), relative_standard_error=0.1
    )
    assert abs(result.mean) < 1e-15


def test_early_stop(x64):
    problem = polynomial(cubic=False)
    result = curvature.average_sharpness(
        problem.loss, problem.params, sigma=0.1, key=jax.random.key(0), num_probes=500, relative_standard_error=0.1
    )
    assert 10 <= result.num_probes < 500
    assert result.standard_error <= 0.1 * abs(result.mean)


def test_adaptive_sharpness_does_not_change_under_relu_rescaling(x64):
    params, rescaled, data = relu_case()
    for measure, kwargs in (
        (curvature.worst_case_sharpness, {"rho": 0.2, "num_steps": 5}),
        (curvature.average_sharpness, {"sigma": 0.2, "key": jax.random.key(0), "num_probes": 3}),
    ):
        before = measure(relu_loss, params, data, adaptive=True, **kwargs)
        after = measure(relu_loss, rescaled, data, adaptive=True, **kwargs)
        np.testing.assert_allclose(after[0], before[0], rtol=1e-8)
        plain = [measure(relu_loss, p, data, **kwargs)[0] for p in (params, rescaled)]
        assert abs(plain[1] / plain[0] - 1) > 0.05  # which the measure without scaling is not


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        (curvature.worst_case_sharpness, {"rho": 0.0}, "rho must be positive"),
        (curvature.worst_case_sharpness, {"rho": -1.0}, "rho must be finite and not negative"),
        (curvature.worst_case_sharpness, {"rho": 1.0, "num_steps": 0}, "num_steps must be at least 1"),
        (curvature.worst_case_sharpness, {"rho": 1.0, "step_size": 0.0}, "step_size must be positive"),
        (curvature.average_sharpness, {"sigma": 0.0, "key": jax.random.key(0)}, "sigma must be positive"),
        (curvature.average_sharpness, {"sigma": 1.0, "key": jax.random.key(0), "num_probes": 1}, "at least 2"),
    ],
)
def test_bad_settings_are_refused(function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.sum, jnp.ones(2), **kwargs)
