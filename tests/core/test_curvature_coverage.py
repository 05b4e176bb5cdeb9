"""Every error bar against the spread of many repetitions on known matrices.

R repetitions with normal errors know a ratio of spreads to about 1/√(2R); the bounds are four times that, and
coverages within four standard deviations of a binomial.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from crsam_jax import curvature
from crsam_jax.curvature._quadrature import smoothed as _smoothed
from crsam_jax.curvature._xtrace import xtrace
from crsam_jax.curvature.ratio import _ratio

pytestmark = pytest.mark.usefixtures("x64")


def xtrace_of(h, probes):
    """XTrace of a dense matrix; probes are rows."""
    return xtrace(lambda v: (jnp.asarray(h @ np.asarray(v[0])),), [(probe,) for probe in jnp.asarray(probes)])


def with_eigenvalues(values, seed=0):
    values = np.asarray(values, float)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return basis * values @ basis.T


def quadratic(w, h):
    return 0.5 * w @ h @ w


def spread_over_claimed(errors, claimed):
    return np.sqrt(np.mean(np.square(errors), axis=0) / np.mean(np.square(claimed), axis=0))


def assert_covers(errors, claimed, degrees, slack=0.0):
    """Student's interval covers the truth in 95 of 100 repetitions, or in more."""
    errors, claimed = np.abs(errors), np.asarray(claimed)
    share = np.mean(errors <= stats.t.ppf(0.975, degrees) * claimed)
    assert share >= 0.95 - slack - 4 * math.sqrt(0.95 * 0.05 / len(errors))


MATRICES = {
    "one level": with_eigenvalues(np.linspace(1, 3, 80)),
    "both signs": with_eigenvalues(np.where(np.arange(80) % 2, -0.5, 1) / np.arange(1, 81)),
    "slow decay": with_eigenvalues(1 / np.arange(1.0, 81)),
    "fast decay": with_eigenvalues(0.9 ** np.arange(80)),
    "ten and nothing": with_eigenvalues([*[1.0] * 10, *[1e-3] * 70]),
}


@pytest.mark.parametrize("estimator", ["rademacher", "gaussian"])
def test_trace(estimator):
    repetitions, h = 200, MATRICES["fast decay"]
    results = [
        curvature.hessian_trace(
            quadratic, jnp.zeros(80), {"h": h}, key=jax.random.key(i), num_probes=10, estimator=estimator
        )
        for i in range(repetitions)
    ]
    errors = [r.mean - np.trace(h) for r in results]
    claimed = [r.standard_error for r in results]
    assert spread_over_claimed(errors, claimed) == pytest.approx(1, abs=4 / math.sqrt(2 * repetitions))
    assert_covers(errors, claimed, degrees=9)


@pytest.mark.parametrize("num_probes", [2, 5, 20])
@pytest.mark.parametrize("name", MATRICES)
def test_xtrace(name, num_probes):
    """The sample deviation of its leave-one-out values alone would be too small by up to 1.5."""
    rng = np.random.default_rng(0)
    repetitions, h = 250, MATRICES[name]
    draws = rng.normal(size=(repetitions, num_probes, len(h)))
    found = np.array([xtrace_of(h, probes) for probes in draws])
    errors, variances = found[:, 0] - np.trace(h), found[:, 1]
    bound = 4 / math.sqrt(2 * repetitions) * (2 if num_probes == 2 else 1)  # the squares of two are far from normal
    assert spread_over_claimed(errors, np.sqrt(variances)) == pytest.approx(1, abs=bound)
    assert_covers(errors, np.sqrt(variances), num_probes - 1)


def test_xtrace_of_a_spectrum_that_halves_claims_rather_too_much():
    rng = np.random.default_rng(0)
    repetitions, h = 250, with_eigenvalues(0.5 ** np.arange(40))
    found = np.array([xtrace_of(h, probes) for probes in rng.normal(size=(repetitions, 8, 40))])
    errors, claimed = found[:, 0] - np.trace(h), np.sqrt(found[:, 1])
    assert 0.4 < spread_over_claimed(errors, claimed) < 1
    assert_covers(errors, claimed, degrees=7)


def test_xtrace_is_that_of_matfree():
    """Value by value; its error is not, see above."""
    rng = np.random.default_rng(0)
    stochtrace = pytest.importorskip("matfree.stochtrace")
    for h in MATRICES.values():
        probes = jnp.asarray(rng.normal(size=(7, len(h))))
        values = stochtrace.leave_one_out_xtrace()(lambda v, h=h: h @ v, probes)
        mean, variance = xtrace_of(h, probes)
        assert mean == pytest.approx(float(values.mean()), rel=1e-11)
        assert variance >= float(jnp.var(values, ddof=1)) / 7 * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("rank", [0, 1, 4, 6])
def test_xtrace_is_exact_where_the_probes_span_all_there_is(rank, dtype):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(50, rank))
    h = jnp.asarray(factor @ factor.T, dtype)
    mean, variance = xtrace_of(h, jnp.asarray(rng.normal(size=(7, 50)), dtype))
    scale = float(jnp.trace(h)) * float(jnp.finfo(dtype).eps)
    assert mean == pytest.approx(float(jnp.trace(h)), abs=50 * scale)
    assert math.sqrt(variance) <= 50 * scale


@pytest.mark.parametrize("num_probes", [2, 4, 8])
def test_spectrum(num_probes):
    """With as many steps as parameters: the nodes are the eigenvalues, the weights have Dirichlet's distribution."""
    rng = np.random.default_rng(0)
    repetitions, n, width = 600, 100, 0.1
    values = np.concatenate([np.abs(rng.normal(size=n - 4)) / 10, [2.0, 3.0, 5.0, 9.0]])
    grid = np.array([0.0, 0.05, 0.2, 0.4, 2.0, 3.1, 5.0, 9.1])
    bumps = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    errors, claimed, sample = [], [], []
    for _ in range(repetitions):
        weights = rng.dirichlet(np.full(n, 0.5), size=num_probes)
        spectrum = _smoothed(np.broadcast_to(values, weights.shape), weights, grid, width, n)
        errors.append(spectrum.density - bumps.mean(axis=1))
        claimed.append(spectrum.standard_error)
        sample.append((weights @ bumps.T).std(axis=0, ddof=1) / math.sqrt(num_probes))
    errors, claimed, sample = np.array(errors), np.array(claimed), np.array(sample)
    ratios = spread_over_claimed(errors, claimed)
    assert np.all(ratios < 1 + 4 / math.sqrt(2 * repetitions))
    assert np.all(ratios > 0.65)  # the larger of two is somewhat too large
    assert np.all(np.sqrt(np.mean(errors**2, axis=0)) < 1.15 * claimed.mean(axis=0))  # as the median repetition sees it
    assert np.any(np.sqrt(np.mean(errors**2, axis=0)) > 1.15 * sample.mean(axis=0))
    assert_covers(errors, claimed, num_probes - 1, slack=0.01)
    q = stats.t.ppf(0.975, num_probes - 1)
    assert np.mean(np.abs(errors[:, 4:]) <= q * sample[:, 4:]) < 0.92  # what the sample alone would cover


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [12, 30])
def test_spectrum_by_lanczos(num_steps):
    """Nodes wander where the steps are few: there the sample carries the error bar, and is unbiased."""
    repetitions, num_probes = 60, 6
    h = with_eigenvalues(np.concatenate([np.linspace(0, 1, 28), [3.0, 6.0]]))
    grid = np.array([0.1, 0.4, 0.9, 3.0, 6.0])
    results = [
        curvature.hessian_spectrum(
            quadratic, jnp.zeros(30), {"h": h}, key=jax.random.key(i), num_probes=num_probes, num_steps=num_steps,
            grid=grid, width=0.15,
        )
        for i in range(repetitions)
    ]  # fmt: skip
    densities = np.array([r.density for r in results])
    errors, claimed = densities - densities.mean(axis=0), np.array([r.standard_error for r in results])
    assert np.all(spread_over_claimed(errors, claimed) < 1 + 4 / math.sqrt(2 * repetitions))
    assert_covers(errors, claimed, num_probes - 1)


def test_average_sharpness():
    repetitions, h, sigma = 150, MATRICES["fast decay"], 0.3
    results = [
        curvature.average_sharpness(
            quadratic, jnp.zeros(80), {"h": h}, sigma=sigma, key=jax.random.key(i), num_probes=8
        )
        for i in range(repetitions)
    ]
    errors = [r.mean - sigma**2 / 2 * np.trace(h) for r in results]
    claimed = [r.standard_error for r in results]
    assert spread_over_claimed(errors, claimed) == pytest.approx(1, abs=4 / math.sqrt(2 * repetitions))
    assert_covers(errors, claimed, degrees=7, slack=0.02)


def test_approximation_ratio():
    rng = np.random.default_rng(0)
    repetitions, examples = 1500, 60
    many = rng.gamma(3.0, size=(repetitions, examples)) + 0.5
    one = 0.7 * many + 0.3 * rng.normal(size=many.shape)
    results = [_ratio(a, b, 0.01) for a, b in zip(one, many, strict=True)]
    for value, error in (
        ("mean_of_ratios", "standard_error"),
        ("ratio_of_means", "ratio_of_means_standard_error"),
    ):
        errors = [getattr(r, value) - 0.7 for r in results]
        claimed = [getattr(r, error) for r in results]
        assert spread_over_claimed(errors, claimed) == pytest.approx(1, abs=4 / math.sqrt(2 * repetitions) + 0.02)
        assert_covers(errors, claimed, examples - 1, slack=0.01)


def test_stopping_at_a_small_error_favours_small_errors():
    """As documented: about 1.2 too small where it stops at some twenty probes."""
    repetitions, h = 150, MATRICES["fast decay"]
    results = [
        curvature.hessian_trace(
            quadratic, jnp.zeros(80), {"h": h}, key=jax.random.key(i), num_probes=100, relative_standard_error=0.07
        )
        for i in range(repetitions)
    ]
    assert 12 < np.mean([r.num_probes for r in results]) < 40
    errors, claimed = [r.mean - np.trace(h) for r in results], [r.standard_error for r in results]
    assert (
        1 - 4 / math.sqrt(2 * repetitions) < spread_over_claimed(errors, claimed) < 1.3 + 4 / math.sqrt(2 * repetitions)
    )
