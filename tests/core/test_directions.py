"""Where to look: the directions of SAM and ASAM, and their restriction to a part of the tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crsam_jax import asam, sam
from crsam_jax.ascents import Ascent, adaptive_ascent, gradient_ascent, masked_ascent
from tests.core.problems import flat, mlp, one_step

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "bias": jnp.array([-3.0])}
GRADS = {"kernel": jnp.array([[0.1, 0.7], [-2.0, 0.3]]), "bias": jnp.array([1.5])}


def direction(ascent, grads=GRADS, params=PARAMS):
    return ascent.apply(grads, ascent.init(params), params)[0]


def test_gradient_ascent_is_the_unit_gradient_with_one_global_norm():
    v = direction(gradient_ascent())
    np.testing.assert_allclose(flat(v), flat(GRADS) / np.linalg.norm(flat(GRADS)), rtol=1e-6)
    assert jax.tree.structure(v) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("eta", [0.0, 0.01, 2.0])
def test_adaptive_ascent_is_asam_with_one_global_norm(eta):
    scale = np.abs(flat(PARAMS)) + eta
    expected = scale**2 * flat(GRADS) / np.linalg.norm(scale * flat(GRADS))
    np.testing.assert_allclose(flat(direction(adaptive_ascent(eta))), expected, rtol=1e-6)


@pytest.mark.parametrize("adaptive", [{"kernel": True, "bias": False}, lambda params: {"kernel": True, "bias": False}])
def test_leaves_that_are_not_adaptive_have_scale_one(adaptive):
    v = direction(adaptive_ascent(0.1, adaptive))
    scale = {"kernel": jnp.abs(PARAMS["kernel"]) + 0.1, "bias": jnp.ones(1)}
    expected = flat(scale) ** 2 * flat(GRADS) / np.linalg.norm(flat(scale) * flat(GRADS))
    np.testing.assert_allclose(flat(v), expected, rtol=1e-6)


def test_adaptive_ascent_solves_its_constrained_problem():
    """v maximizes ⟨g, v⟩ where ‖v/T‖ ≤ 1, so ‖v/T‖ = 1 and ⟨g, v⟩ = ‖T g‖."""
    v, scale = flat(direction(adaptive_ascent(0.3))), np.abs(flat(PARAMS)) + 0.3
    assert np.linalg.norm(v / scale) == pytest.approx(1, rel=1e-6)
    assert flat(GRADS) @ v == pytest.approx(np.linalg.norm(scale * flat(GRADS)), rel=1e-6)


def test_asam_is_invariant_to_rescaling_of_weights_that_leaves_the_network_alone():
    """w₁ → c w₁, w₂ → w₂/c does not change x ↦ w₂·(w₁ x): ASAM's L⁺ stays, SAM's does not."""

    def loss_fn(params):
        return (params["second"] @ (params["first"] @ jnp.array([1.0, -2.0])) - 1.0) ** 2

    params = {"first": jnp.array([[0.3, 0.2], [-0.1, 0.5]]), "second": jnp.array([0.7, -0.4])}
    rescaled = {"first": 8 * params["first"], "second": params["second"] / 8}
    losses = {
        method: [float(one_step(method(loss_fn, **options), loss_fn, p)[1].loss_plus) for p in (params, rescaled)]
        for method, options in ((asam, {"rho": 0.1, "eta": 0.0}), (sam, {"rho": 0.1}))
    }
    assert losses[asam][0] == pytest.approx(losses[asam][1], rel=1e-5)
    assert losses[sam][0] != pytest.approx(losses[sam][1], rel=1e-2)


@pytest.mark.parametrize("mask", [{"kernel": True, "bias": False}, lambda params: {"kernel": True, "bias": False}])
def test_mask_takes_the_norm_over_the_chosen_part_alone(mask):
    v = direction(masked_ascent(gradient_ascent(), mask))
    assert v["bias"] == 0
    np.testing.assert_allclose(v["kernel"], GRADS["kernel"] / np.linalg.norm(GRADS["kernel"]), rtol=1e-6)


def test_mask_may_be_a_prefix():
    _, params, _ = mlp()
    v = direction(masked_ascent(gradient_ascent(), {"first": True, "second": False}), params, params)
    assert np.linalg.norm(flat(v["first"])) == pytest.approx(1, rel=1e-6)
    assert not np.any(flat(v["second"]))


def test_mask_of_true_and_of_false_are_the_ends():
    everything = lambda params: jax.tree.map(lambda _: True, params)
    np.testing.assert_array_equal(
        flat(direction(masked_ascent(gradient_ascent(), everything))), flat(direction(gradient_ascent()))
    )
    with pytest.raises(ValueError, match="mask is False for all params"):
        direction(masked_ascent(gradient_ascent(), lambda params: jax.tree.map(lambda _: False, params)))


def test_masks_that_do_not_fit_are_errors_that_say_where():
    with pytest.raises(ValueError, match=r"mask must be a prefix of params"):
        direction(masked_ascent(gradient_ascent(), {"kernel": True}))
    with pytest.raises(TypeError, match=r"mask must have True or False at its leaves, found 0"):
        direction(masked_ascent(gradient_ascent(), {"kernel": 1, "bias": 0}))
    with pytest.raises(ValueError, match="adaptive must be a prefix of params"):
        direction(adaptive_ascent(0.1, {"kernel": True}))


@pytest.mark.parametrize("eta", [-1.0, float("nan"), float("inf")])
def test_eta_is_checked_at_construction(eta):
    with pytest.raises(ValueError, match="eta"):
        adaptive_ascent(eta)


@pytest.mark.parametrize("ascent", [gradient_ascent(), adaptive_ascent(0.0)])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_without_a_usable_gradient_there_is_no_direction(ascent, value):
    grads = jax.tree.map(lambda g: jnp.full_like(g, value), GRADS)
    assert not np.any(flat(direction(ascent, grads)))


def test_asam_around_zero_weights_has_no_direction_without_eta():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    assert not np.any(flat(direction(adaptive_ascent(0.0), params=params)))
    assert np.linalg.norm(flat(direction(adaptive_ascent(0.5), params=params))) == pytest.approx(0.5)


@pytest.mark.parametrize("ascent", [gradient_ascent(), adaptive_ascent(0.01)])
def test_directions_of_half_precision_are_in_float32(ascent):
    grads, params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (GRADS, PARAMS))
    v = direction(ascent, grads, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(v))


def test_an_ascent_of_ones_own_carries_its_state_through_the_transformation():
    def apply(grads, state, params, gradient_fn):
        momentum = jax.tree.map(lambda m, g: 0.5 * m + g, state, grads)
        return gradient_ascent().apply(momentum, (), params)[0], momentum

    loss_fn = lambda w: jnp.sum(w**3)
    tx = sam(loss_fn, rho=0.1, ascent=Ascent(jnp.zeros_like, apply))
    w, state, momentum = jnp.array([1.0, 2.0]), tx.init(jnp.zeros(2)), np.zeros(2)
    for _ in range(3):
        grads = jax.grad(loss_fn)(w)
        gradient, state = tx.update(grads, state, w)
        momentum = 0.5 * momentum + np.asarray(grads)
        expected = 3 * (np.asarray(w) + 0.1 * momentum / np.linalg.norm(momentum)) ** 2
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)
        w = w - 0.01 * gradient
    np.testing.assert_allclose(state.ascent, momentum, rtol=1e-6)
