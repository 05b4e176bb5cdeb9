"""Eigenvalues and spectral density against dense eigendecompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsam_jax import curvature
from tests.core.curvature_problems import cut, dense_case, normal_like
from tests.core.problems import flat, mlp_loss


def quadratic(diagonal):
    return lambda w: 0.5 * jnp.sum(jnp.asarray(diagonal) * w**2)


def test_eigenvalues_are_those_of_the_dense_hessian(x64):
    case = dense_case()
    pairs = curvature.top_eigenvalues(
        mlp_loss, case.params, {"batch": case.batch}, key=jax.random.key(0), num_eigenvalues=4, num_steps=60
    )
    np.testing.assert_allclose(pairs.values, case.eigenvalues[:4], rtol=1e-6)
    vectors = np.stack([flat(vector) for vector in pairs.vectors])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(4), atol=1e-7)
    np.testing.assert_allclose(vectors @ case.hessian, pairs.values[:, None] * vectors, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), num_steps=st.sampled_from([3, 8, 20]))
def test_an_eigenvalue_lies_within_each_residual(seed, num_steps):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(20, 20))
        truth = np.linalg.eigvalsh(a + a.T)
        loss_fn = lambda w, h: 0.5 * w @ h @ w
        pairs = curvature.top_eigenvalues(
            loss_fn, jnp.zeros(20), {"h": a + a.T}, key=jax.random.key(seed), num_eigenvalues=3, num_steps=num_steps
        )
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):
        assert np.min(np.abs(truth - value)) <= residual + 1e-9
    assert pairs.values[0] <= truth[-1] + 1e-9
    if num_steps == 20:
        np.testing.assert_allclose(pairs.values, truth[::-1][:3], rtol=1e-9)


def test_largest_means_algebraically_largest(x64):
    pairs = curvature.top_eigenvalues(
        quadratic([-100.0, 3.0, 1.0]), jnp.zeros(3), key=jax.random.key(0), num_eigenvalues=2
    )
    np.testing.assert_allclose(pairs.values, [3.0, 1.0], rtol=1e-12)


def test_agrees_with_power_iteration_and_deflation(x64):
    """The definitions of PyHessian: power iteration on Hessian-vector products, deflated by the vectors found."""
    case = dense_case()
    data = cut(case.batch, [10, 22])
    found, expected = [], []
    for _ in range(2):
        vector = np.random.default_rng(1).normal(size=len(case.hessian))
        for _ in range(3000):
            for previous in found:
                vector = vector - (previous @ vector) * previous
            vector = vector / np.linalg.norm(vector)
            image = case.hessian @ vector
            value, vector = vector @ image, image
        found.append(vector / np.linalg.norm(vector))
        expected.append(value)
    pairs = curvature.top_eigenvalues(
        mlp_loss, case.params, data, key=jax.random.key(0), num_eigenvalues=2, num_steps=60
    )
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "diagonal", [[0.0] * 6, [2.0] * 6, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [5.0, 5.0, 1.0, 1.0, 0.0, 0.0]]
)
def test_an_exhausted_krylov_space_gives_no_spurious_eigenvalues(x64, diagonal, dtype):
    distinct = sorted(set(diagonal), reverse=True)
    args = quadratic(jnp.asarray(diagonal, dtype)), jnp.zeros(6, dtype)
    pairs = curvature.top_eigenvalues(*args, key=jax.random.key(0), num_eigenvalues=len(distinct), num_steps=6)
    np.testing.assert_allclose(pairs.values, distinct, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"only {len(distinct)} distinct"):
        curvature.top_eigenvalues(*args, key=jax.random.key(0), num_eigenvalues=len(distinct) + 1, num_steps=6)
    spectrum = curvature.hessian_spectrum(*args, key=jax.random.key(0), num_steps=6)
    np.testing.assert_allclose(spectrum.weights.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.trapezoid(spectrum.density, spectrum.grid), 1.0, atol=1e-3)
    for node, weight in zip(spectrum.nodes.ravel(), spectrum.weights.ravel(), strict=True):
        assert weight == 0 or np.min(np.abs(np.array(distinct) - node)) < 1e-5


def test_float32_eigenvalues_agree_to_float32():
    case = dense_case()
    pairs = curvature.top_eigenvalues(
        mlp_loss, case.params, {"batch": case.batch}, key=jax.random.key(0), num_eigenvalues=3, num_steps=50
    )
    np.testing.assert_allclose(pairs.values, case.eigenvalues[:3], rtol=1e-4)


def test_each_probes_quadrature_has_the_moments_of_its_measure(x64):
    """With m steps Σ_j weight node^p = zᵀHᵖz/‖z‖² up to p = 2m − 1, so their expectation is Tr Hᵖ/n."""
    case, key, num_steps = dense_case(), jax.random.key(5), 4
    spectrum = curvature.hessian_spectrum(
        mlp_loss, case.params, cut(case.batch, [20, 12]), key=key, num_probes=3, num_steps=num_steps
    )
    for i, probe_key in enumerate(jax.random.split(key, 3)):
        z = flat(normal_like(probe_key, case.params))
        for power in range(2 * num_steps):
            expected = z @ np.linalg.matrix_power(case.hessian, power) @ z / (z @ z)
            np.testing.assert_allclose(spectrum.weights[i] @ spectrum.nodes[i] ** power, expected, rtol=1e-8)


def test_density_is_the_smoothed_measure_of_each_probe(x64):
    """With n steps a probe's density is Σ_i (uᵢᵀz)²/‖z‖² N(t; λᵢ, width²), whose expectation is the spectrum's."""
    case, key, width = dense_case(), jax.random.key(7), 0.05
    n = len(case.hessian)
    grid = np.linspace(-0.5, 2.0, 60)
    spectrum = curvature.hessian_spectrum(
        mlp_loss, case.params, {"batch": case.batch}, key=key, num_probes=4, num_steps=n, grid=grid, width=width
    )
    eigenvalues, eigenvectors = np.linalg.eigh(case.hessian)
    bumps = np.exp(-0.5 * ((grid[:, None] - eigenvalues) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    probes = np.stack([flat(normal_like(probe_key, case.params)) for probe_key in jax.random.split(key, 4)])
    shares = (probes @ eigenvectors) ** 2 / np.sum(probes**2, axis=1, keepdims=True)
    densities = shares @ bumps.T
    np.testing.assert_allclose(spectrum.density, densities.mean(axis=0), rtol=1e-6, atol=1e-8)
    of_sample = densities.std(axis=0, ddof=1) / 2
    moments = np.mean(shares @ (bumps**2).T, axis=0) - densities.mean(axis=0) ** 2
    of_measures = np.sqrt(2 / (n + 2) * moments.clip(0)) / 2  # Dirichlet's variance of the shares
    np.testing.assert_allclose(spectrum.standard_error, np.maximum(of_sample, of_measures), rtol=1e-6, atol=1e-8)
    assert np.mean(of_sample > of_measures) > 0.3


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        (curvature.top_eigenvalues, {"num_eigenvalues": 0}, "at least 1"),
        (curvature.top_eigenvalues, {"num_eigenvalues": 2, "num_steps": 1}, "num_steps must be at least 2"),
        (curvature.top_eigenvalues, {"num_steps": 4}, "only 3 parameters"),
        (curvature.top_eigenvalues, {"num_eigenvalues": 4}, "at least 4"),
        (curvature.hessian_spectrum, {"num_probes": 1}, "at least 2"),
        (curvature.hessian_spectrum, {"width": 0.0}, "width must be positive"),
        (curvature.hessian_spectrum, {"grid": [[0.0]]}, "grid must be"),
        (curvature.hessian_spectrum, {"grid": [np.nan]}, "grid must be"),
    ],
)
def test_bad_settings_are_refused(function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(quadratic([1.0, 2.0, 3.0]), jnp.zeros(3), key=jax.random.key(0), **kwargs)
