"""Properties that hold for all gradients, trees and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsam_jax import Execution, crsam_gradient
from crsam_jax.ascents import adaptive_ascent, gradient_ascent
from tests.core.problems import MEMBERS, flat, one_step, polynomial

thorough = settings(max_examples=40)
frugal = settings(max_examples=6)  # where each example is a compilation

numbers = st.floats(-100, 100, width=32).map(lambda x: round(x, 2))
vectors = st.lists(numbers, min_size=6, max_size=6).filter(lambda values: any(abs(x) > 0.01 for x in values))
powers = st.integers(-100, 80)


def tree_of(values):
    x = jnp.array(values, jnp.float32)
    return {"a": x[:2].reshape(1, 2), "b": {"c": x[2], "d": None, "e": x[3:]}}


PARAMS = tree_of([0.5, -1.0, 2.0, 0.1, -0.3, 1.5])


@thorough
@given(vectors, powers)
def test_the_direction_does_not_depend_on_the_gradients_scale(values, power):
    """Exactly so for powers of two, over nearly all of float32's range."""
    grads = tree_of(values)
    scaled = jax.tree.map(lambda g: g * jnp.float32(2.0) ** power, grads)
    for ascent in (gradient_ascent(), adaptive_ascent(0.01)):
        v, _ = ascent.apply(grads, (), PARAMS)
        w, _ = ascent.apply(scaled, (), PARAMS)
        np.testing.assert_allclose(flat(w), flat(v), rtol=1e-6, atol=1e-30)


@thorough
@given(vectors)
def test_the_direction_has_length_one_and_points_uphill(values):
    grads = tree_of(values)
    v = flat(gradient_ascent().apply(grads, (), PARAMS)[0])
    assert np.linalg.norm(v) == pytest.approx(1, rel=1e-5)
    assert v @ flat(grads) == pytest.approx(np.linalg.norm(flat(grads)), rel=1e-5)


@thorough
@given(vectors, st.floats(0.0, 2.0))
def test_the_adaptive_direction_points_uphill(values, eta):
    grads = tree_of(values)
    v = flat(adaptive_ascent(eta).apply(grads, (), PARAMS)[0])
    scaled = (np.abs(flat(PARAMS)) + eta) * flat(grads)
    assert v @ flat(grads) == pytest.approx(np.linalg.norm(scaled), rel=1e-4)


@pytest.mark.parametrize("name", MEMBERS)
@frugal
@given(order=st.permutations(range(6)))
def test_a_permutation_of_the_leaves_permutes_the_gradient(name, order):
    problem = polynomial(cubic=True)
    values = flat(problem.params)
    tx = MEMBERS[name](lambda leaves: problem.loss(jnp.stack(leaves)))
    back = np.argsort(order)
    permuted = MEMBERS[name](lambda leaves: problem.loss(jnp.stack([leaves[i] for i in back])))
    found = flat(one_step(permuted, lambda leaves: problem.loss(jnp.stack([leaves[i] for i in back])),
                          [jnp.float32(values[i]) for i in order])[0])  # fmt: skip
    expected = flat(one_step(tx, lambda leaves: problem.loss(jnp.stack(leaves)), [jnp.float32(x) for x in values])[0])
    np.testing.assert_allclose(found[back], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 7.0, 1e3])
def test_the_penalty_without_offset_does_not_see_the_losss_scale(scale):
    """∇ log S and ∇ log D stay where L becomes cL; with an offset they do not."""
    with jax.enable_x64(True):
        problem = polynomial(cubic=True)
        penalty = {}
        for c in (1.0, scale):
            loss = lambda w, c=c: c * problem.loss(w)
            with_penalty = flat(crsam_gradient(loss, 0.3, 0.5, 0.2, offset=0.0)(problem.params)[0])
            without = flat(crsam_gradient(loss, 0.3, 0.0, 0.0, offset=0.0)(problem.params)[0])
            penalty[c] = with_penalty - without
        np.testing.assert_allclose(penalty[scale], penalty[1.0], rtol=1e-8, atol=1e-9)
        assert np.linalg.norm(penalty[1.0]) > 0.01


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_the_linear_forms_of_the_family_scale_with_the_loss(scale):
    with jax.enable_x64(True):
        problem = polynomial(cubic=True)
        for name in ("sam", "asam", "wsam", "gsam", "gradient_norm_penalty", "crsam_linear"):
            scaled = lambda w: scale * problem.loss(w)
            found, _ = one_step(MEMBERS[name](scaled), scaled, problem.params)
            expected, _ = one_step(MEMBERS[name](problem.loss), problem.loss, problem.params)
            np.testing.assert_allclose(flat(found), scale * flat(expected), rtol=1e-9)


@thorough
@given(st.floats(-50, 50), st.floats(1e-3, 10), st.floats(0.01, 3))
def test_the_bound_holds_whatever_the_weights(alpha_exponent, bound, rho):
    problem = polynomial(cubic=True)
    alpha = 2.0**alpha_exponent
    options = {"offset": 0.0, "max_penalty_ratio": bound}
    bounded, _ = crsam_gradient(problem.loss, rho, alpha, alpha, **options)(problem.params)
    plain, _ = crsam_gradient(problem.loss, rho, 0.0, 0.0, **options)(problem.params)
    size = np.linalg.norm(flat(bounded) - flat(plain))
    assert size <= bound * np.linalg.norm(flat(plain)) * (1 + 1e-3) + 1e-4 * np.linalg.norm(flat(plain))


# Shapes of trees

TREES = {
    "empty": {},
    "only None": {"a": None},
    "an array": jnp.array([1.0, -2.0]),
    "a scalar": jnp.float32(1.5),
    "None leaves": {"a": jnp.ones(2), "b": None, "c": (None, jnp.float32(2.0))},
    "an empty array": {"a": jnp.ones(2), "b": jnp.zeros((0, 3))},
    "numpy arrays": {"a": np.ones(2, np.float32), "b": np.float32(1.0)},
    "deep": {"0": [({"1": [({"2": [({"3": jnp.ones(1)}, jnp.ones(2))]},)]}, (jnp.float32(2.0),))]},
}


def square(tree):
    return 0.5 * sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("name", MEMBERS)
def test_any_tree_keeps_its_structure_and_shapes(name, kind):
    """On ½‖w‖² every gradient of the family is a positive multiple of w."""
    params = TREES[kind]
    gradient, diagnostics = one_step(MEMBERS[name](square, rho=0.1), square, params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
    w = flat(params)
    if name != "asam" and w.size:
        np.testing.assert_allclose(flat(gradient) * np.linalg.norm(w), w * np.linalg.norm(flat(gradient)), rtol=1e-5)
        assert diagnostics.cosine == pytest.approx(1)
        assert diagnostics.guarded_steps == 0
    assert not any(np.isnan(x) for x in jax.tree.leaves(diagnostics))


@pytest.mark.parametrize("kind", ["empty", "a scalar"])
@pytest.mark.parametrize("evaluation", ["vmap", "sequential", "ordered", "auto"])
def test_the_smallest_trees_work_in_all_strategies(kind, evaluation):
    gradient, _ = crsam_gradient(square, execution=Execution(evaluation))(TREES[kind])
    assert jax.tree.structure(gradient) == jax.tree.structure(TREES[kind])
