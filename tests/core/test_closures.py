"""The loss given at update, and messages for those who come from elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crsam_jax
from tests.core.problems import MEMBERS, flat, mlp

CLOSURES = ("value_fn", "obj_fn")
POLICIES = {
    "periodic": lambda tx: crsam_jax.periodic(tx, 2),
    "late": lambda tx: crsam_jax.late(tx, 0),
    "look": lambda tx: crsam_jax.look(tx, 2),
    "adaptive": crsam_jax.adaptive_policy,
}


def updated(tx, grads, params, **extra):
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params, **extra))(grads, params)


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_loss_given_at_update_gives_the_numbers_of_one_given_at_construction(name, closure):
    loss_fn, params, batch = mlp()
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    expected = updated(MEMBERS[name](loss_fn, rho=0.1), grads, params, loss=loss, batch=batch)
    found = updated(MEMBERS[name](rho=0.1), grads, params, loss=loss, **{closure: lambda w: loss_fn(w, batch)})
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_pass_the_loss_on(policy):
    loss_fn, params, batch = mlp()
    grads = jax.grad(loss_fn)(params, batch)
    make = POLICIES[policy]
    expected = updated(make(crsam_jax.crsam(loss_fn)), grads, params, batch=batch)
    found = updated(make(crsam_jax.crsam()), grads, params, value_fn=lambda w: loss_fn(w, batch))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "search",
    [
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
        optax.scale_by_zoom_linesearch(max_linesearch_steps=15),
    ],
    ids=["backtracking", "zoom"],
)
def test_one_closure_serves_the_method_and_a_line_search_behind_it(search):
    loss_fn, params, batch = mlp()
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    tx = optax.chain(crsam_jax.sam(rho=0.01), optax.sgd(1.0), search)
    updates, state = tx.update(grads, tx.init(params), params, value=loss, grad=grads, value_fn=loss_fn, batch=batch)
    assert loss_fn(optax.apply_updates(params, updates), batch) < loss
    assert optax.tree.get(state[0], "loss_plus") > loss


def test_a_loss_with_aux_given_at_update():
    loss_fn = lambda w: (jnp.sum(w**2) / 2, {"norm": jnp.sum(w**2)})
    w = jnp.array([3.0, 4.0])
    gradient, _ = updated(crsam_jax.sam(rho=0.5, has_aux=True), w, w, value_fn=loss_fn)
    np.testing.assert_allclose(gradient, [3.3, 4.4], rtol=1e-6)


def test_without_injection_nothing_is_static():
    """The closure comes at update, so that inject_hyperparams sees numbers alone."""
    square = lambda w: jnp.sum(w**2) / 2
    w = jnp.array([3.0, 4.0])
    tx = optax.inject_hyperparams(crsam_jax.sam)(rho=optax.linear_schedule(0.5, 0.0, 1))
    gradient, _ = updated(tx, w, w, value_fn=square)
    np.testing.assert_allclose(gradient, [3.3, 4.4], rtol=1e-6)


def test_no_loss_at_all_says_both_ways():
    w = jnp.ones(2)
    with pytest.raises(TypeError, match=r"without loss_fn.*value_fn=loss_of_params"):
        updated(crsam_jax.sam(), w, w, batch=w)


# Messages


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        (crsam_jax.sam, {"adaptive": True}, "asam"),
        (crsam_jax.sam, {"sync_period": 2}, "periodic"),
        (crsam_jax.crsam, {"gamma": 0.9}, "wsam"),
        (crsam_jax.gsam, {"weight_decay": 1e-4}, "optax.adamw"),
        (crsam_jax.crsam, {"grad_fn": jax.grad}, "give the loss"),
        (crsam_jax.crsam_gradient, {"lr": 0.1}, "behind the method"),
    ],
)
def test_an_argument_of_another_library_names_what_takes_its_place(method, argument, message):
    with pytest.raises(TypeError, match=rf"no argument '{next(iter(argument))}'.*{message}.*migrating"):
        method(jnp.sum, **argument)


def test_params_behind_another_argument_is_a_question_of_order():
    with pytest.raises(TypeError, match="params must be the first argument"):
        crsam_jax.sam(lambda batch, params: jnp.sum(params * batch))


@pytest.mark.parametrize("value", [True, False, jnp.array(True)])
@pytest.mark.parametrize("name", ["mask", "adaptive"])
def test_a_bare_bool_is_no_mask(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be a tree.*static_args"):
        crsam_jax.asam(jnp.sum, **{name: value})


@pytest.mark.parametrize("name", ["mask", "adaptive"])
def test_a_mask_that_injection_takes_for_a_schedule_is_refused(name):
    loss_fn = lambda params: jnp.sum(params["w"] ** 3) + 3 * params["b"] ** 2
    params = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array(1.0)}
    which = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    grads = jax.grad(loss_fn)(params)
    static = optax.inject_hyperparams(crsam_jax.asam, static_args=("loss_fn", name))(loss_fn, 0.5, 0.0, **{name: which})
    expected = updated(crsam_jax.asam(loss_fn, 0.5, 0.0, **{name: which}), grads, params)[0]
    np.testing.assert_allclose(flat(updated(static, grads, params)[0]), flat(expected), rtol=1e-6)
    if name == "adaptive":
        np.testing.assert_allclose(flat(expected), [6.722, 3.372, 26.340], rtol=1e-3)
    tx = optax.inject_hyperparams(crsam_jax.asam, static_args="loss_fn")(loss_fn, 0.5, 0.0, **{name: which})
    with pytest.raises(TypeError, match="static_args"):
        updated(tx, grads, params)


def test_a_mask_that_perturbs_nothing_is_refused_at_the_first_step():
    loss_fn = lambda params: jnp.sum(params["w"] ** 2)
    params = {"w": jnp.ones(2)}
    for tx in (crsam_jax.sam(loss_fn, mask={"w": False}), crsam_jax.msam(optax.sgd(0.1), mask={"w": False})):
        with pytest.raises(ValueError, match=r"mask is False for all params.*static_args"):
            updated(tx, params, params)


def test_a_tree_of_bools_that_is_callable_is_read_and_not_called():
    @jax.tree_util.register_pytree_node_class
    class Mask:
        def __init__(self, w, b):
            self.w, self.b = w, b

        def __call__(self, params):
            return True

        def tree_flatten(self):
            return (self.w, self.b), None

        @classmethod
        def tree_unflatten(cls, aux, leaves):
            return cls(*leaves)

    loss_fn = lambda params: jnp.sum(params.w**2) + params.b**2
    params = Mask(jnp.array([3.0]), jnp.array(4.0))
    grads = jax.grad(loss_fn)(params)
    found, _ = crsam_jax.sam(loss_fn, 0.5, mask=Mask(True, False)).update(
        grads, crsam_jax.sam(loss_fn).init(params), params
    )
    np.testing.assert_allclose([found.w[0], found.b], [7.0, 8.0], rtol=1e-6)


def test_a_loss_that_ignores_its_params_is_a_mismatch():
    """The usual slip with nnx: the loss closes over the model."""
    w = jnp.array([1.0, 3.0])
    true = lambda w: jnp.mean((w - 1) ** 2)
    for tx in (crsam_jax.crsam(lambda params: true(w) + 0 * jnp.sum(params)), crsam_jax.sam(lambda params: true(w))):
        _, state = tx.update(jax.grad(true)(w), tx.init(w), w)
        assert state.diagnostics.mismatched_steps == 1


def test_whole_numbers_of_numpy_are_whole_numbers():
    tx = crsam_jax.sam(jnp.sum)
    crsam_jax.periodic(tx, np.int64(2))
    crsam_jax.late(tx, np.int32(2))
    crsam_jax.random_probes(np.int64(2), seed=np.int64(3))


def test_old_names_work_and_say_where_they_are():
    with pytest.warns(DeprecationWarning, match=r"write crsam_jax\.ascents\.adaptive_ascent"):
        assert crsam_jax.adaptive_ascent is crsam_jax.ascents.adaptive_ascent
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = crsam_jax.nothing


@pytest.mark.parametrize("name", ["sam", "crsam", "decoupled_wsam", "dynamic_sparse"])
@pytest.mark.parametrize("dtypes", [(jnp.float32, jnp.float32), (jnp.float32, jnp.bfloat16)])
def test_strict_promotion_of_dtypes(name, dtypes):
    params = {"a": jnp.ones(3, dtypes[0]), "b": jnp.ones(2, dtypes[1])}
    loss_fn = lambda params: jnp.sum(params["a"] ** 2) + jnp.sum(params["b"].astype(jnp.float32) ** 2)
    methods = {
        "sam": lambda: crsam_jax.sam(loss_fn),
        "crsam": lambda: crsam_jax.crsam(loss_fn),
        "decoupled_wsam": lambda: crsam_jax.decoupled_wsam(loss_fn, optax.sgd(0.1), 0.1),
        "dynamic_sparse": lambda: crsam_jax.sam(
            loss_fn, ascent=crsam_jax.ascents.dynamic_sparse_ascent(update_every=1)
        ),
    }
    with jax.numpy_dtype_promotion("strict"):
        tx = methods[name]()
        found, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, params)


def test_ascent_only_under_debug_nans():
    w = jnp.array([3.0, 4.0])
    with jax.debug_nans(True):
        tx = crsam_jax.sam(lambda w: jnp.sum(w**2) / 2, 0.5, ascent_only=True)
        found, _ = tx.update(w, tx.init(w), w)
    np.testing.assert_allclose(found, [3.3, 4.4], rtol=1e-6)


def test_the_derivative_of_gsam_by_rho_is_finite():
    square = lambda w: jnp.sum(jnp.array([1.0, 3.0]) * w**2)
    w = jnp.array([3.0, 4.0])

    def length(rho):
        tx = crsam_jax.gsam(square, rho)
        return jnp.sum(tx.update(jax.grad(square)(w), tx.init(w), w)[0] ** 2)

    for rho in (0.0, 0.1):
        assert jnp.isfinite(jax.grad(length)(rho))


@pytest.mark.parametrize("method", [crsam_jax.sam, crsam_jax.crsam])
def test_the_optimizers_own_count_is_the_only_one(method):
    tx = optax.chain(method(jnp.sum), optax.adam(1e-3))
    assert optax.tree.get(tx.init(jnp.ones(2)), "count") == 0
    assert optax.tree.get(crsam_jax.msam(optax.adam(1e-3)).init(jnp.ones(2)), "count") == 0
