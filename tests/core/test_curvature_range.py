"""Measures of very small, very large and broken losses: right, or NaN, or an error; never a wrong zero."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crsam_jax import curvature, landscape

DIAGONAL = jnp.array([1.0, 2.0, 3.0])
SCALES = [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30]


def quadratic(scale):
    return lambda w: scale * 0.5 * jnp.sum(DIAGONAL * w**2)


@pytest.mark.parametrize("scale", SCALES)
def test_eigenvalues_and_residuals_at_every_scale(scale):
    args, kwargs = (quadratic(scale), jnp.zeros(3)), {"key": jax.random.key(0)}
    for found, expected in (
        (curvature.top_eigenvalues(*args, num_eigenvalues=3, **kwargs), [3, 2, 1]),
        (curvature.smallest_eigenvalues(*args, num_eigenvalues=2, **kwargs), [1, 2]),
    ):
        np.testing.assert_allclose(found.values / scale, expected, rtol=1e-5)
        assert np.all(found.residuals / scale < 1e-5)
        assert np.all(found.residuals >= 0)
    cut_short = curvature.top_eigenvalues(*args, num_steps=1, **kwargs)
    assert abs(cut_short.values[0] / scale - 3) > 0.1
    assert cut_short.residuals[0] / scale > 0.1  # says so


@pytest.mark.parametrize("scale", SCALES)
def test_spectrum_and_trace_at_every_scale(scale):
    args, kwargs = (quadratic(scale), jnp.zeros(3)), {"key": jax.random.key(0)}
    spectrum = curvature.hessian_spectrum(*args, **kwargs)
    np.testing.assert_allclose(spectrum.nodes[0] / scale, [1, 2, 3], rtol=1e-5)
    np.testing.assert_allclose(np.trapezoid(spectrum.density, spectrum.grid), 1, atol=1e-3)
    for estimator in ("rademacher", "xtrace"):
        trace = curvature.hessian_trace(*args, estimator=estimator, **kwargs)
        np.testing.assert_allclose(trace.mean / scale, 6, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_xtrace_by_probes_at_every_scale(scale):
    values = jnp.asarray(0.5 ** np.arange(40), jnp.float32)
    loss_fn = lambda w: scale * 0.5 * jnp.sum(values * w**2)
    trace = curvature.hessian_trace(loss_fn, jnp.zeros(40), key=jax.random.key(0), num_probes=12, estimator="xtrace")
    np.testing.assert_allclose(trace.mean / scale, np.sum(np.asarray(values)), rtol=1e-3)
    assert trace.standard_error / scale < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_dense_float32_hessians_against_float64(scale):
    a = np.random.default_rng(0).normal(size=(30, 30))
    h = (a + a.T) / 8
    loss_fn = lambda w, h: 0.5 * scale * (w @ h @ w)
    data = {"h": jnp.asarray(h, jnp.float32)}
    found = curvature.top_eigenvalues(
        loss_fn, jnp.zeros(30), data, key=jax.random.key(0), num_eigenvalues=3, num_steps=30
    )
    np.testing.assert_allclose(found.values / scale, np.linalg.eigvalsh(h)[::-1][:3], rtol=1e-4)


def test_ascent_and_gradient_at_every_scale():
    loss_fn = lambda w, s: s * jnp.sum(w)
    for scale in SCALES:
        args = (loss_fn, jnp.zeros(4), {"s": scale})
        result = curvature.worst_case_sharpness(*args, rho=0.5)
        np.testing.assert_allclose(result.value / scale, 0.5 * 2, rtol=1e-5)
        np.testing.assert_allclose(curvature.gradient_norm(*args), 2 * scale, rtol=1e-6)


ROWS = jnp.array([[0.0, 0.0], [1.0, 2.0]])
BROKEN = {
    "the norm at zero": (jnp.linalg.norm, jnp.zeros(3)),
    "one row of zeros": (
        lambda w: jnp.mean(jnp.linalg.norm(ROWS * w, axis=1)),
        jnp.ones(2),
    ),
    "infinite": (lambda w: jnp.sum(w) * jnp.inf, jnp.ones(2)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_finite_is_never_zero(name):
    loss_fn, params = BROKEN[name]
    key = jax.random.key(0)
    assert math.isnan(curvature.gradient_norm(loss_fn, params))
    assert math.isnan(curvature.worst_case_sharpness(loss_fn, params, rho=0.1).value)
    if name == "infinite":
        return  # its second derivative is zero
    for estimator in ("rademacher", "gaussian", "xtrace"):
        assert math.isnan(curvature.hessian_trace(loss_fn, params, key=key, estimator=estimator).mean)
    for function in (curvature.top_eigenvalues, curvature.smallest_eigenvalues):
        pairs = function(loss_fn, params, key=key, num_eigenvalues=2)
        assert np.all(np.isnan(pairs.values))
        assert np.all(np.isnan(pairs.residuals))
    spectrum = curvature.hessian_spectrum(loss_fn, params, key=key)
    assert np.all(np.isnan(spectrum.nodes))
    assert np.all(np.isnan(spectrum.density))
    with pytest.raises(ValueError, match="not finite"):
        landscape.gradient_direction(loss_fn, params)
    with pytest.raises(ValueError, match="not finite"):
        landscape.orthonormalized([jax.grad(loss_fn)(params)])


def test_nan_later_on_the_path_is_no_maximum():
    loss_fn = lambda w: jnp.where(w[0] > 0.5, jnp.nan, w[0])
    result = curvature.worst_case_sharpness(loss_fn, jnp.zeros(1), rho=1.0, num_steps=4)
    assert math.isnan(result.value)
    assert result.losses[0] == 0


def test_at_a_stationary_point_the_ascent_starts_at_random():
    loss_fn = lambda w: 0.5 * jnp.sum(DIAGONAL * w**2)
    kwargs = {"rho": 1.0, "num_steps": 60, "step_size": 0.2}
    values = [
        curvature.worst_case_sharpness(loss_fn, jnp.zeros(3), key=key, **kwargs).value
        for key in (None, jax.random.key(1))
    ]
    np.testing.assert_allclose(values, 1.5, rtol=1e-3)  # ρ²λ/2
    np.testing.assert_array_equal(landscape.gradient_direction(loss_fn, jnp.zeros(3)), 0)


def test_filters_of_tiny_and_huge_weights():
    for scale in (1e-30, 1e30):
        params = {"kernel": scale * jnp.arange(1.0, 7.0).reshape(3, 2)}
        [direction] = landscape.filter_normalized_directions(params, jax.random.key(0), 1)
        lengths = np.linalg.norm(np.asarray(direction["kernel"], np.float64), axis=0)
        np.testing.assert_allclose(lengths / scale, [np.sqrt(35), np.sqrt(56)], rtol=1e-5)
