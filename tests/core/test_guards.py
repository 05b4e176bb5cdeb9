"""Zero, tiny, huge and broken numbers: what is undefined is left out, once, and counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crsam_jax import Execution, crsam, sam
from tests.core.problems import MEMBERS, ONE_SIDED, TWO_SIDED, flat, mlp, one_step

W = {"a": jnp.array([3.0]), "b": jnp.array(4.0)}


def square(w):
    return 0.5 * (jnp.sum(w["a"] ** 2) + w["b"] ** 2)


def run(tx, grads, params=W):
    gradient, state = tx.update(grads, tx.init(params), params)
    return gradient, state.diagnostics


def gate(value, side, broken):
    """``square``, whose loss or gradient is ``value`` at the probe on one side of W (which the norm tells)."""

    @jax.custom_vjp
    def loss(w):
        return jnp.where(hit(w), value, square(w)) if broken == "loss" else square(w)

    def hit(w):
        length = jnp.sqrt(2 * square(w))
        return {"plus": length > 5.05, "minus": length < 4.95, "center": abs(length - 5) < 0.05}[side]

    def backward(w, cotangent):
        return (jax.tree.map(lambda x: cotangent * (jnp.where(hit(w), value, x) if broken == "grads" else x), w),)

    loss.defvjp(lambda w: (loss(w), w), backward)
    return loss


def assert_no_nan_without_cause(diagnostics, *broken):
    for name, value in diagnostics._asdict().items():
        assert name in broken or np.isfinite(value), name


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_passes_through_unchanged(name, value):
    grads = {"a": jnp.array([1.0]), "b": jnp.array(value)}
    gradient, diagnostics = run(MEMBERS[name](square, rho=0.1), grads)
    np.testing.assert_array_equal(flat(gradient), flat(grads))
    assert diagnostics.guarded_steps == 1
    assert diagnostics.loss == diagnostics.loss_plus == square(W)
    assert_no_nan_without_cause(diagnostics, "grad_norm")


@pytest.mark.parametrize("name", MEMBERS)
def test_a_gradient_of_zero_stays_zero_without_perturbation(name):
    gradient, diagnostics = run(MEMBERS[name](square, rho=0.1), jax.tree.map(jnp.zeros_like, W))
    assert not np.any(flat(gradient))
    assert diagnostics.guarded_steps == 1
    assert diagnostics.loss_plus == diagnostics.loss
    assert_no_nan_without_cause(diagnostics)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1e20, 1e30, 1e37])
def test_tiny_and_huge_gradients_never_give_nan(name, scale):
    """The losses' scale goes with the gradients'; their squares leave float32's range."""
    loss_fn = lambda w: scale * (jnp.sum(w["a"]) + w["b"])
    gradient, diagnostics = one_step(MEMBERS[name](loss_fn, rho=0.1), loss_fn, W)
    assert np.all(np.isfinite(flat(gradient)))
    assert_no_nan_without_cause(diagnostics)
    if scale > 1e-37:
        np.testing.assert_allclose(flat(gradient), scale, rtol=1e-5)  # of a linear loss it is everywhere the same
        assert diagnostics.loss_plus > diagnostics.loss
        assert diagnostics.cosine == pytest.approx(1)
        assert diagnostics.grad_norm == pytest.approx(2**0.5 * scale)


@pytest.mark.parametrize("name", MEMBERS)
def test_rho_of_zero_gives_g_exactly_and_is_no_guard(name):
    loss_fn, params, batch = mlp()
    for rho in (0.0, lambda count: 0.0 * count):
        gradient, diagnostics = one_step(MEMBERS[name](loss_fn, rho=rho), loss_fn, params, batch=batch)
        np.testing.assert_array_equal(flat(gradient), flat(jax.grad(loss_fn)(params, batch)))
        assert diagnostics.guarded_steps == 0
        assert_no_nan_without_cause(diagnostics)


@pytest.mark.parametrize("penalty", ["log", "linear"])
def test_alpha_and_beta_of_zero_give_sam_exactly_and_are_no_guard(penalty):
    """Even where both logarithms are undefined: a concave, descending loss along -g."""
    loss_fn = lambda w: -square(w)
    grads = jax.tree.map(lambda x: x / 5, W)
    tx = crsam(loss_fn, 0.1, 0.0, 0.0, penalty=penalty, offset=0.0)
    gradient, diagnostics = run(tx, grads)
    np.testing.assert_array_equal(flat(gradient), flat(run(sam(loss_fn, 0.1), grads)[0]))
    assert diagnostics.guarded_steps == 0


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("broken", ["loss", "grads"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_plus_probe_gives_g(name, broken, value):
    gradient, diagnostics = run(MEMBERS[name](gate(value, "plus", broken), rho=0.2), W)
    np.testing.assert_array_equal(flat(gradient), flat(W))
    assert diagnostics.guarded_steps == 1
    assert diagnostics.cosine == pytest.approx(1)


@pytest.mark.parametrize("name", TWO_SIDED)
@pytest.mark.parametrize("broken", ["loss", "grads"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_minus_probe_gives_sam(name, broken, value):
    loss_fn = gate(value, "minus", broken)
    gradient, diagnostics = run(MEMBERS[name](loss_fn, rho=0.2), W)
    np.testing.assert_array_equal(flat(gradient), flat(run(sam(loss_fn, 0.2), W)[0]))
    assert diagnostics.guarded_steps == 1
    assert diagnostics.penalty_ratio == 0


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_loss_at_the_center_never_breaks_the_gradient(name, value):
    gradient, _ = run(MEMBERS[name](gate(value, "center", "loss"), rho=0.2), W)
    assert np.all(np.isfinite(flat(gradient)))


# Either logarithm alone. Along g = w/5 and around w, ‖w‖ = 5, with ρ = 0.5:
#   -½‖w‖²  has S = -ρ² = -0.25 and D = -10ρ = -5;  ½‖w‖² the opposite.


def parts(loss_fn, grads, rho=0.5):
    """g⁺, g⁺ + g⁻ − 2g and g⁺ − g⁻ of a quadratic along the given gradient."""
    v = jax.tree.map(lambda g: g / np.linalg.norm(flat(grads)), grads)
    at = lambda s: flat(jax.grad(loss_fn)(jax.tree.map(lambda x, d: x + s * d, W, v)))
    return at(rho), at(rho) + at(-rho) - 2 * flat(grads), at(rho) - at(-rho)


@pytest.mark.parametrize(
    ("offset", "second_is_on", "first_is_on"),
    [(0.0, False, False), (0.2, False, False), (0.3, True, False), (4.9, True, False), (5.1, True, True)],
)
def test_a_logarithm_of_nothing_positive_is_off_alone(offset, second_is_on, first_is_on):
    loss_fn = lambda w: -square(w)
    grads = jax.tree.map(lambda x: x / 5, W)
    gradient, diagnostics = run(crsam(loss_fn, 0.5, 0.3, 0.2, offset=offset), grads)
    plus, second, first = parts(loss_fn, grads)
    expected = plus + second_is_on * 0.3 * second / (offset - 0.25) + first_is_on * 0.2 * first / (offset - 5)
    np.testing.assert_allclose(flat(gradient), expected, rtol=1e-4)
    assert diagnostics.guarded_steps == (not (second_is_on and first_is_on))


def test_a_term_of_no_weight_is_no_guard():
    """S = −0.25 and D = −5 make both logarithms undefined, but only a term with a weight counts."""
    grads = jax.tree.map(lambda x: x / 5, W)
    counts = [
        int(run(crsam(lambda w: -square(w), 0.5, a, b, offset=o), grads)[1].guarded_steps)
        for a, b, o in ((0.1, 0.0, 1.0), (0.0, 0.1, 1.0), (0.0, 0.1, 6.0), (0.1, 0.0, 0.0))
    ]
    assert counts == [0, 1, 0, 1]


def test_differences_below_the_losses_noise_are_off():
    """On a constant of 10⁴ the rounding of float32 is larger than S = ρ² = 0.01, not than D = 1."""
    loss_fn = lambda w: square(w) + 1e4
    gradient, diagnostics = run(crsam(loss_fn, 0.1, 10.0, 1.0, offset=0.0), W)
    np.testing.assert_allclose(flat(gradient), flat(W) * (5.1 / 5 + 0.2 / 5), rtol=1e-3)  # g⁺ and (g⁺−g⁻)/D
    assert diagnostics.guarded_steps == 1


def test_noise_is_measured_in_the_losses_own_dtype():
    """A loss rounded to bfloat16 is noisier than float32 says: S = 0.01 beside losses of 12.5 is off."""
    rounded = lambda w: square(w).astype(jnp.bfloat16)
    tx = lambda loss_fn: crsam(loss_fn, 0.1, 0.1, 0.0, offset=0.05)
    assert run(tx(square), W)[1].guarded_steps == 0
    assert run(tx(rounded), W)[1].guarded_steps == 1


@pytest.mark.parametrize("penalty", ["log", "linear"])
def test_a_penalty_that_overflows_is_off(penalty):
    loss_fn = lambda w: 1e36 * (w["b"] ** 3 + jnp.sum(w["a"]) ** 3)
    gradient, diagnostics = one_step(crsam(loss_fn, 0.5, 1e30, 1e30, penalty=penalty, offset=0.0), loss_fn, W)
    assert np.all(np.isfinite(flat(gradient)))
    if penalty == "linear":
        assert diagnostics.guarded_steps == 1


@pytest.mark.parametrize("evaluation", ["vmap", "sequential", "ordered"])
def test_each_step_is_counted_at_most_once_and_only_if_guarded(evaluation):
    """Plus and minus probe, both logarithms, or g itself broken at once: one count a step."""
    broken = lambda w: jnp.where(w["b"] == 4, 0.0, jnp.nan) * jnp.sum(w["a"]) - square(w)
    tx = crsam(broken, 0.2, 0.1, 0.1, offset=0.0, max_penalty_ratio=1e-3, execution=Execution(evaluation))
    state = tx.init(W)
    history = [W, jax.tree.map(lambda x: x * jnp.nan, W), jax.tree.map(jnp.zeros_like, W), W]
    for step, grads in enumerate(history, 1):
        _, state = tx.update(grads, state, W)
        assert state.diagnostics.guarded_steps == step
    assert state.diagnostics.bounded_steps == 0
    good = crsam(square, 0.2, 0.1, 0.1, offset=0.0, max_penalty_ratio=1e-3, execution=Execution(evaluation))
    _, state = good.update(W, state, W)
    assert state.diagnostics.guarded_steps == 4
    assert state.diagnostics.bounded_steps == 1


@pytest.mark.parametrize("name", ONE_SIDED)
def test_one_sided_methods_report_no_field_they_cannot_fill(name):
    fields = set(run(MEMBERS[name](square), W)[1]._fields)
    assert fields == {"loss", "loss_plus", "grad_norm", "cosine", "curvature", "guarded_steps", "mismatched_steps"}


def test_a_step_that_fell_back_on_g_is_not_counted_as_bounded():
    """The penalty is there and above its bound, but L⁺ is broken, so it has no part in the result."""
    options = {"penalty": "linear", "alpha": 1.0, "beta": 1.0, "max_penalty_ratio": 1e-3}
    assert run(crsam(square, 0.2, **options), W)[1].bounded_steps == 1
    assert run(crsam(gate(np.nan, "plus", "loss"), 0.2, **options), W)[1].bounded_steps == 0
