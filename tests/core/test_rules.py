"""Rules on scalars alone: each method's formula as weights of its gradients, and members written from public names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crsam_jax
from crsam_jax._crsam import curvature_penalty
from crsam_jax._one_sided import gradient_norm, sharpness, surrogate_gap, weighted_sharpness
from crsam_jax.engine import (
    HERE,
    MINUS,
    PLUS,
    Outcome,
    Step,
    at_multiples,
    of_gradients,
    one_sided,
    sharpness_aware,
    two_sided,
)
from tests.core.problems import flat, mlp, one_step, polynomial

pytestmark = pytest.mark.usefixtures("x64")


def vectors_of(g, plus, minus=None):
    return [g, plus - g] + ([] if minus is None else [plus + minus - 2 * g])


def step_of(g, plus, minus=None, losses=(1.0, 1.3, 0.9), rho=0.5):
    """A step whose gradients are short vectors, with products computed by numpy."""
    length, vectors = np.linalg.norm(g), vectors_of(g, plus, minus)
    return Step(
        loss=jnp.asarray(losses[0]),
        loss_plus=jnp.asarray(losses[1]),
        further_losses=[jnp.asarray(losses[2])] if minus is not None else [],
        rho=jnp.asarray(rho),
        reach=jnp.asarray(rho),
        grad_norm=jnp.asarray(length),
        gram=[[jnp.asarray(a @ b) / length**2 for b in vectors] for a in vectors],
        along=[jnp.asarray(g @ b) / length**2 for b in vectors],
        loss_epsilon=1e-16,
        is_perturbed=jnp.asarray(True),
        params=g,
    )


def tree_of(weights, g, plus, minus=None):
    return sum(float(weight) * vector for weight, vector in zip(weights, vectors_of(g, plus, minus), strict=False))


G, G_PLUS, G_MINUS = np.array([3.0, 0.0]), np.array([4.0, 2.0]), np.array([2.5, -1.0])
FORMULAS = {
    "sam": (sharpness, {}, G_PLUS),
    "wsam": (weighted_sharpness, {"gamma": 0.75}, -2 * G + 3 * G_PLUS),
    "gradient norm": (gradient_norm, {"alpha": 0.25}, 0.75 * G + 0.25 * G_PLUS),
    "gsam": (surrogate_gap, {"alpha": 0.5}, G_PLUS - 0.5 * (G - 12 / 20 * G_PLUS)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_one_sided_formulas(name):
    rule, numbers, expected = FORMULAS[name]
    found = rule(step_of(G, G_PLUS), **{name: jnp.asarray(value) for name, value in numbers.items()})
    weights = found.weights if isinstance(found, Outcome) else found
    np.testing.assert_allclose(tree_of(weights, G, G_PLUS), expected, rtol=1e-12)


@pytest.mark.parametrize(("form", "a", "b"), [("log", 0.3 / 1.2, 0.2 / 1.4), ("linear", 0.3, 0.2)])
def test_crsam_is_equation_7(form, a, b):
    """S = 0.3 − 0.1 and D = 0.4."""
    rule = curvature_penalty(form, 0.3, 0.2, 1.0, None, "losses")
    numbers = {name: jnp.asarray(value) for name, value in rule.numbers.items()}
    outcome = rule.combine(step_of(G, G_PLUS, G_MINUS), **numbers)
    penalty = a * (G_PLUS + G_MINUS - 2 * G) + b * (G_PLUS - G_MINUS)
    np.testing.assert_allclose(tree_of(outcome.penalty, G, G_PLUS, G_MINUS), penalty, rtol=1e-12)
    np.testing.assert_allclose(tree_of(outcome.weights, G, G_PLUS, G_MINUS), G_PLUS + penalty, rtol=1e-12)
    assert not outcome.is_guarded


@pytest.mark.parametrize(("losses", "a", "b"), [((1.0, 1.3, 0.6), 0, 2 / 7), ((1.0, 0.9, 1.3), 0.3 / 0.2, 0)])
def test_a_logarithm_without_a_positive_argument_has_no_weight(losses, a, b):
    """S = −0.1, or D = −0.4, with δ = 0."""
    rule = curvature_penalty("log", 0.3, 0.2, 0.0, None, "losses")
    numbers = {name: jnp.asarray(value) for name, value in rule.numbers.items()}
    outcome = rule.combine(step_of(G, G_PLUS, G_MINUS, losses), **numbers)
    expected = a * (G_PLUS + G_MINUS - 2 * G) + b * (G_PLUS - G_MINUS)
    np.testing.assert_allclose(tree_of(outcome.penalty, G, G_PLUS, G_MINUS), expected, rtol=1e-9, atol=1e-12)
    assert outcome.is_guarded


def test_weights_of_gradients_are_weights_of_differences():
    weights = of_gradients(here=2.0, plus=-1.5, minus=0.25)
    np.testing.assert_allclose(tree_of(weights, G, G_PLUS, G_MINUS), 2 * G - 1.5 * G_PLUS + 0.25 * G_MINUS, rtol=1e-12)
    for gradient, weights in ((G, HERE), (G_PLUS, PLUS), (G_MINUS, MINUS)):
        np.testing.assert_allclose(tree_of(weights, G, G_PLUS, G_MINUS), gradient, rtol=1e-12)


def test_what_a_rule_reads_are_inner_products():
    step, g = step_of(G, G_PLUS, G_MINUS), np.linalg.norm(G)
    assert step.dot(PLUS, MINUS) * g**2 == pytest.approx(G_PLUS @ G_MINUS)
    assert step.norm(MINUS) * g == pytest.approx(np.linalg.norm(G_MINUS))
    assert step.slope(PLUS) == pytest.approx(G @ G_PLUS / g)
    assert step.projection(HERE, onto=PLUS) == pytest.approx(G @ G_PLUS / (G_PLUS @ G_PLUS))
    assert step.ratio(MINUS, PLUS) == pytest.approx(np.linalg.norm(G_MINUS) / np.linalg.norm(G_PLUS))
    assert step.cosine(HERE, PLUS) == pytest.approx(G @ G_PLUS / g / np.linalg.norm(G_PLUS))


# Members that a user writes


def test_a_two_sided_member_from_public_names():
    def rule(step, alpha):
        return of_gradients(here=-2 * alpha, plus=1 + alpha, minus=alpha)

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
        return 0.0, 8 / 12, -8 / 12, -1 / 12, 1 / 12

    loss_fn, params, batch = mlp(dtype=jnp.float64)
    grads = jax.grad(loss_fn)(params, batch)
    unit = jax.tree.map(lambda g: g / np.linalg.norm(flat(grads)), grads)
    curve = jax.jvp(lambda w: jax.grad(loss_fn)(w, batch), (params,), (unit,))[1]
    for rho, error in ((0.1, 1e-4), (0.05, 1e-5)):
        tx = sharpness_aware(loss_fn, at_multiples(rule, [-1, 2, -2]), rho)
        found, _ = one_step(tx, loss_fn, params, batch=batch)
        np.testing.assert_allclose(flat(found) / rho, flat(curve), atol=error * np.linalg.norm(flat(curve)))


def test_a_one_sided_member_with_a_schedule():
    rule = one_sided(lambda step, weight: of_gradients(here=1 - weight, plus=weight), weight=lambda t: t)
    square = lambda w: jnp.sum(w**2) / 2
    tx, w = sharpness_aware(square, rule, 1.0), jnp.array([3.0, 4.0])
    state, outs = tx.init(w), []
    for _ in range(2):
        out, state = tx.update(w, state, w)
        outs.append(out)
    np.testing.assert_allclose(outs, [w, 1.2 * w], rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda step: (1.0, 1.0), "rule must be built by one_sided"),
        (one_sided(lambda step: step.loss_plus), "returns weights of .* this one returned"),
        (one_sided(lambda step: 0.5), "returns weights of .* this one returned"),
        (one_sided(lambda step: (jnp.ones(2), 1.0)), "returns scalars"),
        (one_sided(lambda step: of_gradients(minus=1.0)), "a weight of g⁻ needs two_sided"),
        (one_sided(lambda step: (step.loss_minus, 1.0)), "no point w − ρv"),
        (two_sided(lambda step: (1.0, 1.0, 0.0, 0.5)), "returned 4 weights where it has 3"),
    ],
)
def test_a_mistake_in_a_rule_gets_one_sentence(rule, message):
    square = lambda w: jnp.sum(w**2)
    w = jnp.ones(2)
    with pytest.raises(TypeError, match=message):
        sharpness_aware(square, rule, 0.1).update(w, sharpness_aware(square, rule, 0.1).init(w), w)


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
    with pytest.raises(TypeError, match=r"wraps a method.*periodic\(sam\(loss_fn\), 2\)"):
        crsam_jax.periodic(jnp.sum, 2)
