"""Rules on scalars alone: each method's formula as weights of its gradients, and members written from public names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crsam_jax
from crsam_jax import Vector, at_multiples, one_sided, sharpness_aware, two_sided
from crsam_jax.members.curvature_penalty import curvature_penalty
from crsam_jax.members.gradient_norm import gradient_norm
from crsam_jax.members.gsam import surrogate_gap
from crsam_jax.members.sam import sharpness
from crsam_jax.members.wsam import weighted_sharpness
from crsam_jax.step.products import Products
from crsam_jax.step.rule import Point, Step
from tests.problems import flat, mlp, one_step, polynomial

pytestmark = pytest.mark.usefixtures("x64")


def step_of(g, plus, minus=None, losses=(1.0, 1.3, 0.9), rho=0.5):
    """A step whose gradients are short vectors, with products computed by numpy."""
    trees = [g, plus - g] + ([] if minus is None else [plus + minus - 2 * g])
    gram = [[jnp.asarray(a @ b) for b in trees] for a in trees]
    rest = (0.0,) * (len(trees) - 2)
    length = np.linalg.norm(g)
    products = Products(gram, [jnp.asarray(g @ t / length) for t in trees], jnp.ones(()), jnp.zeros((), jnp.int32))
    return Step(
        here=Point(jnp.asarray(losses[0]), Vector((1.0, 0.0, *rest))),
        plus=Point(jnp.asarray(losses[1]), Vector((1.0, 1.0, *rest))),
        losses=[jnp.asarray(losses[2])] if minus is not None else [],
        vectors=[Vector((1.0, -1.0, 1.0))] if minus is not None else [],
        rho=jnp.asarray(rho),
        products=products,
        loss_epsilon=1e-16,
        is_perturbed=jnp.asarray(True),
        params=g,
    )


def tree_of(vector, g, plus, minus=None):
    trees = [g, plus - g] + ([] if minus is None else [plus + minus - 2 * g])
    return sum(float(weight) * tree for weight, tree in zip(vector.weights, trees, strict=True))


G, PLUS, MINUS = np.array([3.0, 0.0]), np.array([4.0, 2.0]), np.array([2.5, -1.0])
FORMULAS = {
    "sam": (sharpness, {}, PLUS),
    "wsam": (weighted_sharpness, {"gamma": 0.75}, -2 * G + 3 * PLUS),
    "gradient norm": (gradient_norm, {"alpha": 0.25}, 0.75 * G + 0.25 * PLUS),
    "gsam": (surrogate_gap, {"alpha": 0.5}, PLUS - 0.5 * (G - 12 / 20 * PLUS)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_one_sided_formulas(name):
    rule, numbers, expected = FORMULAS[name]
    found = rule(step_of(G, PLUS), **{name: jnp.asarray(value) for name, value in numbers.items()})
    vector = found if isinstance(found, Vector) else found.gradient
    np.testing.assert_allclose(tree_of(vector, G, PLUS), expected, rtol=1e-12)


@pytest.mark.parametrize(("form", "a", "b"), [("log", 0.3 / 1.2, 0.2 / 1.4), ("linear", 0.3, 0.2)])
def test_crsam_is_equation_7(form, a, b):
    """S = 0.3 − 0.1 and D = 0.4."""
    rule = curvature_penalty(form, 0.3, 0.2, 1.0, None, "losses")
    numbers = {name: jnp.asarray(value) for name, value in rule.numbers.items()}
    outcome = rule.combine(step_of(G, PLUS, MINUS), **numbers)
    penalty = a * (PLUS + MINUS - 2 * G) + b * (PLUS - MINUS)
    np.testing.assert_allclose(tree_of(outcome.penalty, G, PLUS, MINUS), penalty, rtol=1e-12)
    np.testing.assert_allclose(tree_of(outcome.gradient, G, PLUS, MINUS), PLUS + penalty, rtol=1e-12)
    assert not outcome.is_guarded


@pytest.mark.parametrize(("losses", "a", "b"), [((1.0, 1.3, 0.6), 0, 2 / 7), ((1.0, 0.9, 1.3), 0.3 / 0.2, 0)])
def test_a_logarithm_without_a_positive_argument_has_no_weight(losses, a, b):
    """S = −0.1, or D = −0.4, with δ = 0."""
    rule = curvature_penalty("log", 0.3, 0.2, 0.0, None, "losses")
    numbers = {name: jnp.asarray(value) for name, value in rule.numbers.items()}
    outcome = rule.combine(step_of(G, PLUS, MINUS, losses), **numbers)
    expected = a * (PLUS + MINUS - 2 * G) + b * (PLUS - MINUS)
    np.testing.assert_allclose(tree_of(outcome.penalty, G, PLUS, MINUS), expected, rtol=1e-9, atol=1e-12)
    assert outcome.is_guarded


def test_vectors_are_linear():
    a, b = Vector((1.0, 2.0, 0.0)), Vector((0.5, -1.0, 4.0))
    assert (2 * a - b / 2 + -b).weights == (1.25, 5.5, -6.0)
    traced = jax.jit(lambda s: (s * a).weights)(3.0)
    assert [float(w) for w in traced] == [3.0, 6.0, 0.0]


# Members that a user writes


def test_a_two_sided_member_from_public_names():
    def rule(step, alpha):
        return step.plus.grad + alpha * (step.plus.grad + step.minus.grad - 2 * step.here.grad)

    problem = polynomial(True)
    tx = sharpness_aware(problem.loss, two_sided(rule, alpha=0.3), 0.2)
    found, diagnostics = one_step(tx, problem.loss, problem.params)
    expected, _ = one_step(crsam_jax.crsam(problem.loss, 0.2, 0.3, 0.0, penalty="linear"), problem.loss, problem.params)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-12)
    assert diagnostics.curvature != 0
    assert diagnostics.penalty_ratio == 0


def test_a_member_with_four_points_from_public_names():
    """The fourth-order difference of gradients along v, exact on a quadratic: ρHv."""

    def rule(step):
        minus, far, other_far = (point.grad for point in step.further)
        return (8 * (step.plus.grad - minus) - (far - other_far)) / 12

    loss_fn, params, batch = mlp(dtype=jnp.float64)
    grads = jax.grad(loss_fn)(params, batch)
    unit = jax.tree.map(lambda g: g / np.linalg.norm(flat(grads)), grads)
    curve = jax.jvp(lambda w: jax.grad(loss_fn)(w, batch), (params,), (unit,))[1]
    for rho, error in ((0.1, 1e-4), (0.05, 1e-5)):
        tx = sharpness_aware(loss_fn, at_multiples(rule, [-1, 2, -2]), rho)
        found, _ = one_step(tx, loss_fn, params, batch=batch)
        np.testing.assert_allclose(flat(found) / rho, flat(curve), atol=error * np.linalg.norm(flat(curve)))


def test_a_one_sided_member_with_a_schedule():
    rule = one_sided(lambda step, weight: (1 - weight) * step.here.grad + weight * step.plus.grad, weight=lambda t: t)
    square = lambda w: jnp.sum(w**2) / 2
    tx, w = sharpness_aware(square, rule, 1.0), jnp.array([3.0, 4.0])
    state, outs = tx.init(w), []
    for _ in range(2):
        out, state = tx.update(w, state, w)
        outs.append(out)
    np.testing.assert_allclose(outs, [w, 1.2 * w], rtol=1e-12)


# The caller's loss


@pytest.mark.parametrize("method", [crsam_jax.sam, crsam_jax.crsam])
def test_the_callers_loss_is_taken_and_not_evaluated_again(method):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    tx = method(loss_fn, 0.2)
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    expected = tx.update(grads, tx.init(params), params, batch=batch)
    found = tx.update(grads, tx.init(params), params, batch=batch, loss=loss)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-12)
    other = tx.update(grads, tx.init(params), params, batch=batch, loss=loss + 1)[1]
    assert other.diagnostics.loss == loss + 1

    def forward_passes(**given):
        traced = jax.make_jaxpr(lambda g, p: tx.update(g, tx.init(p), p, batch=batch, **given))(grads, params)
        return str(traced).count("tanh")

    assert forward_passes(loss=loss) < forward_passes()


@pytest.mark.parametrize("loss", [jnp.ones(2), (1.0, None), 1, "0.1"])
def test_a_loss_that_is_no_scalar_is_an_error(loss):
    loss_fn, params, batch = mlp()
    tx = crsam_jax.sam(loss_fn)
    with pytest.raises(TypeError, match="loss= takes L"):
        tx.update(params, tx.init(params), params, batch=batch, loss=loss)


# Numbers that change later


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
@pytest.mark.parametrize("name", ["rho", "alpha", "beta", "offset", "max_penalty_ratio"])
def test_a_schedule_that_leaves_the_range_falls_back_on_g_and_is_counted(name, value):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    options = {"rho": 0.1, "max_penalty_ratio": 1.0} | {name: lambda count: jnp.where(count == 0, 0.1, value)}
    tx = crsam_jax.crsam(loss_fn, **options)
    grads = jax.grad(loss_fn)(params, batch)
    state = tx.init(params)
    first, state = tx.update(grads, state, params, batch=batch)
    assert state.diagnostics.guarded_steps == 0
    assert np.any(flat(first) != flat(grads))
    second, state = tx.update(grads, state, params, batch=batch)
    np.testing.assert_array_equal(flat(second), flat(grads))
    assert state.diagnostics.guarded_steps == 1


def test_a_share_of_one_falls_back_on_g_and_is_counted():
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    for gamma in (1.0, 1.5):
        tx = crsam_jax.wsam(loss_fn, gamma=lambda count, gamma=gamma: gamma)
        found, diagnostics = one_step(tx, loss_fn, params, batch=batch)
        np.testing.assert_array_equal(flat(found), flat(jax.grad(loss_fn)(params, batch)))
        assert diagnostics.guarded_steps == 1


def test_a_combination_that_overflows_float16_falls_back_and_is_counted():
    grads = jnp.asarray([6e4, 3.6e4], jnp.float16)
    loss_fn = lambda w: jnp.sum(grads.astype(jnp.float32) * w.astype(jnp.float32)) + jnp.sum(w.astype(jnp.float32) ** 2)
    w = jnp.asarray([3e3, 1e3], jnp.float16)
    tx = crsam_jax.wsam(loss_fn, rho=2e3, gamma=0.9)
    gradient, state = tx.update(grads, tx.init(w), w)
    np.testing.assert_array_equal(gradient, grads)
    assert state.diagnostics.guarded_steps == 1
    assert state.diagnostics.cosine == pytest.approx(1)


def test_a_combination_that_overflows_float32_falls_back_on_sam_and_is_counted():
    square = lambda w: 1e30 * jnp.sum(w**2)
    w = jnp.asarray([1.0, 2.0], jnp.float32)
    tx = crsam_jax.crsam(square, 0.5, 1e30, 1e30, penalty="linear")
    found, diagnostics = one_step(tx, square, w)
    expected, _ = one_step(crsam_jax.sam(square, 0.5), square, w)
    np.testing.assert_array_equal(found, expected)
    assert diagnostics.guarded_steps == 1


@pytest.mark.parametrize("method", [crsam_jax.sam, crsam_jax.crsam, crsam_jax.asam])
def test_differentiating_through_a_step_at_zero_gradient_gives_zeros(method):
    """And elsewhere the derivative is finite."""
    square = lambda w: jnp.sum(w**2) / 2
    tx = method(square)
    length = lambda w: jnp.sum(tx.update(jax.grad(square)(w), tx.init(w), w)[0] ** 2)
    np.testing.assert_array_equal(jax.grad(length)(jnp.zeros(3)), 0)
    assert np.all(np.isfinite(jax.grad(length)(jnp.array([1.0, 2.0, 0.0]))))


# Late


def test_late_is_the_gradient_first_and_the_member_after():
    square = lambda w: jnp.sum(w**4)
    member, w = crsam_jax.crsam(square, 0.3), jnp.array([1.0, 2.0])
    expected = member.update(jax.grad(square)(w), member.init(w), w)[0]
    for tx in (crsam_jax.late(member, 3), crsam_jax.late(member, 0.6, total_steps=5)):
        state, outs = tx.init(w), []
        for _ in range(5):
            out, state = jax.jit(tx.update)(jax.grad(square)(w), state, w)
            outs.append(out)
        np.testing.assert_array_equal(outs[:3], [jax.grad(square)(w)] * 3)
        np.testing.assert_allclose(outs[3:], [expected] * 2, rtol=1e-12)
        assert (state.steps, state.full_steps, state.start) == (5, 2, 3)


def test_late_and_all_policies_reject_what_they_cannot_use():
    member = crsam_jax.sam(jnp.sum)
    for arguments, error in (((-1,), ValueError), ((0.5,), TypeError), ((1.5, 10), ValueError), ((0.5, 0), ValueError)):
        with pytest.raises(error):
            crsam_jax.late(member, *arguments)
    with pytest.raises(TypeError, match=r"wraps a member.*periodic\(sam\(loss_fn\), 2\)"):
        crsam_jax.periodic(jnp.sum, 2)
