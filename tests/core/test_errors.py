"""Bad input never passes silently, and the message names the fix."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import Execution, asam, crsam, crsam_gradient, gradient_norm_penalty, gsam, late, msam, sam, wsam
from crsam_jax.ascents import adaptive_ascent, sparse_ascent
from tests.core.problems import MEMBERS

PARAMS = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array([3.0])}


def loss_fn(params):
    return jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2)


NUMBERS = [(method, "rho") for method in MEMBERS.values()] + [
    *((crsam, name) for name in ("alpha", "beta", "offset", "max_penalty_ratio")),
    (crsam_gradient, "rho"),
    (wsam, "gamma"),
    (gsam, "alpha"),
    (gradient_norm_penalty, "alpha"),
    (asam, "eta"),
]


@pytest.mark.parametrize(("method", "name"), NUMBERS)
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), np.float32(-1), jnp.array(-1.0)])
def test_negative_and_non_finite_constants_are_errors_at_construction(method, name, value):
    with pytest.raises(ValueError, match=name):
        method(loss_fn, **{name: value})


@pytest.mark.parametrize(("method", "name"), NUMBERS)
@pytest.mark.parametrize("value", ["0.1", True, 1j, [0.1], jnp.ones(1), np.ones((1, 1))])
def test_constants_that_are_no_real_scalars_are_errors_at_construction(method, name, value):
    with pytest.raises(TypeError, match=name):
        method(loss_fn, **{name: value})


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_gamma_is_below_one(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\)"):
        wsam(loss_fn, gamma=gamma)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("bad", ["loss", 3.0, jnp.ones(2)])
def test_a_loss_that_is_not_callable_is_an_error_at_construction(name, bad):
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        MEMBERS[name](bad)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("evaluation", ["parallel", None])
def test_an_unknown_evaluation_is_an_error_that_lists_the_valid_ones(name, evaluation):
    with pytest.raises(ValueError, match=r"strategy.*'auto', 'vmap', 'sequential', 'ordered'"):
        MEMBERS[name](loss_fn, execution=Execution(evaluation))


@pytest.mark.parametrize("penalty", ["quadratic", None])
def test_an_unknown_penalty_is_an_error_that_lists_the_valid_ones(penalty):
    with pytest.raises(ValueError, match=r"penalty.*'log', 'linear'"):
        crsam(loss_fn, penalty=penalty)


@pytest.mark.parametrize("ascent", [adaptive_ascent, "adaptive"])
def test_what_is_no_ascent_is_an_error_at_construction(ascent):
    with pytest.raises(TypeError, match=r"ascent must be an Ascent") as error:
        crsam(loss_fn, ascent=ascent)
    assert ("call it" in str(error.value)) == callable(ascent)


def test_axis_name_and_has_aux_have_types():
    with pytest.raises(TypeError, match="axis_name"):
        crsam(loss_fn, execution=Execution(axis_name=("data", "model")))
    with pytest.raises(TypeError, match="has_aux"):
        crsam(loss_fn, has_aux="yes")


@pytest.mark.parametrize("name", MEMBERS)
def test_update_without_params_is_an_error(name):
    tx = MEMBERS[name](loss_fn)
    with pytest.raises(ValueError, match=r"params is None.*update\(grads, state, params"):
        tx.update(PARAMS, tx.init(PARAMS))


def update(grads, params=PARAMS, loss_fn=loss_fn):
    tx = crsam(loss_fn)
    return tx.update(grads, tx.init(params), params)


def test_a_gradient_of_another_structure_is_an_error():
    with pytest.raises(ValueError, match="structure of params"):
        update({"w": PARAMS["w"]})
    with pytest.raises(ValueError, match="structure of params"):
        update({"w": PARAMS["w"], "b": None})


def test_a_gradient_of_another_shape_is_an_error_that_says_where():
    with pytest.raises(ValueError, match=r"shape \(1,\) at \['w'\] where params has \(1, 2\)"):
        update({"w": jnp.ones(1), "b": PARAMS["b"]})


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.bool_])
def test_complex_and_integer_leaves_are_errors_that_say_where(dtype):
    bad = {"w": PARAMS["w"], "b": jnp.ones(1, dtype)}
    with pytest.raises(TypeError, match=rf"gradient has dtype {jnp.dtype(dtype)} at \['b'\]"):
        update(bad)
    with pytest.raises(TypeError, match=rf"params has dtype {jnp.dtype(dtype)} at \['b'\]"):
        update(bad, bad)


def test_crsam_gradient_takes_no_schedules_and_needs_grads_under_an_axis():
    for name in ("rho", "alpha", "beta", "offset", "max_penalty_ratio"):
        with pytest.raises(TypeError, match=f"{name}.*schedule"):
            crsam_gradient(loss_fn, **{name: lambda count: 0.1})
    with pytest.raises(ValueError, match="pass grads"):
        crsam_gradient(loss_fn, execution=Execution(axis_name="data"))(PARAMS)


# Wrappers that hide params from the loss


@pytest.mark.parametrize("name", MEMBERS)
def test_masked_and_partition_around_it_are_errors_that_name_mask(name):
    tx = MEMBERS[name](loss_fn)
    masked = optax.masked(tx, {"w": True, "b": False})
    parted = optax.partition({"on": tx, "off": optax.set_to_zero()}, {"w": "on", "b": "off"})
    for wrapped in (masked, parted):
        with pytest.raises(ValueError, match=r"hidden at \['b'\].*mask="):
            wrapped.update(PARAMS, wrapped.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("params", [PARAMS, {"w": jnp.ones((1, 2))}])
def test_flatten_around_it_is_an_error_that_names_mask(name, params):
    tree_loss = lambda p: sum(jnp.sum(p[key]) for key in p)
    wrapped = optax.flatten(MEMBERS[name](tree_loss))
    with pytest.raises(Exception, match=r"(?s)flatten.*mask="):
        wrapped.update(params, wrapped.init(params), params)


def test_an_error_of_the_loss_itself_is_left_as_it_is():
    def broken(params):
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer") as error:
        update(PARAMS, loss_fn=broken)
    assert not any("optax.flatten" in note for note in getattr(error.value, "__notes__", []))


def test_a_schedule_is_no_constant():
    sam(loss_fn, rho=optax.linear_schedule(0.0, 0.1, 10))
    crsam(loss_fn, alpha=lambda count: 0.1, beta=optax.constant_schedule(0.1), offset=lambda count: 1.0)


# What is no tree of arrays


class Layer:
    """A model of some library: no container, and to jax one leaf."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A model whose leaves are seen by jax, as Equinox's and nnx's are."""

    weight: jax.Array
    activation: object


@pytest.mark.parametrize("name", MEMBERS)
def test_a_leaf_that_is_no_array_is_an_error_with_path_and_type(name):
    for params in ({"w": jnp.ones(2), "f": jnp.tanh}, {"w": jnp.ones(2), "f": "float32"}, {"f": jnp.float32}):
        with pytest.raises(TypeError, match=r"leaf of type \w+ at \['f'\].*eqx.partition") as error:
            MEMBERS[name](loss_fn).init(params)
        assert "nnx" not in str(error.value)


@pytest.mark.parametrize("params", [Layer(), Model(jnp.ones(2), jnp.tanh), Model(jnp.ones(2), jnp.array(3))])
@pytest.mark.parametrize("make", [lambda: sam(loss_fn), lambda: msam(optax.sgd(0.1))])
def test_a_model_in_the_place_of_params_is_an_error_that_says_how_to_get_them(params, make):
    with pytest.raises(TypeError, match=rf"params .*test_errors.{type(params).__name__}.*nnx.split.*Linen.*Keras"):
        make().init(params)


def test_models_of_flax_and_equinox_are_named():
    linen, nnx, equinox = (pytest.importorskip(name) for name in ("flax.linen", "flax.nnx", "equinox"))
    models = [
        linen.Dense(3),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        equinox.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)),
    ]
    for model in models:
        with pytest.raises(TypeError, match=f"object of type .*{type(model).__name__}: if it is a model"):
            sam(loss_fn).init(model)


def test_a_model_made_of_arrays_is_params():
    model = Model(jnp.ones(2), jnp.ones(1))
    gradient, _ = sam(lambda m: jnp.sum(m.weight**2)).update(model, sam(loss_fn).init(model), model)
    assert isinstance(gradient, Model)


def test_a_gradient_that_is_none_is_an_error_that_says_what_to_pass():
    with pytest.raises(ValueError, match=r"structure of params.*None at \['b'\].*zeros.*mask="):
        update({"w": PARAMS["w"], "b": None})


@pytest.mark.parametrize("name", MEMBERS)
def test_an_argument_by_position_is_an_error_that_names_it(name):
    def loss_fn(params, batch):
        return jnp.sum(params["w"] * batch)

    tx = MEMBERS[name](loss_fn)
    with pytest.raises(TypeError, match=r"update\(grads, state, params, batch=\.\.\.\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, 2.0)
    with pytest.raises(TypeError, match=r"gradient_fn\(params, grads, batch=\.\.\.\)"):
        crsam_gradient(loss_fn)(PARAMS, PARAMS, 2.0)


def test_apply_gradients_of_a_train_state_is_named():
    train_state = pytest.importorskip("flax.training.train_state")
    tx = optax.chain(sam(lambda params, batch: jnp.sum(params["w"] * batch)), optax.sgd(0.1))
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    with pytest.raises(TypeError, match=r"needs 'batch'.*TrainState.apply_gradients.*state.tx.update"):
        state.apply_gradients(grads=PARAMS, batch=1.0)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_optimizer_in_the_place_of_the_loss_is_an_error_that_shows_the_chain(name):
    with pytest.raises(TypeError, match=r"loss_fn must be callable.*optax.chain\(sam\(loss_fn\), optax.sgd"):
        MEMBERS[name](optax.sgd(0.1))


@pytest.mark.parametrize("name", MEMBERS)
def test_inject_hyperparams_that_calls_the_loss_as_a_schedule_is_an_error_that_names_static_args(name):
    tx = optax.inject_hyperparams(MEMBERS[name])(lambda params: jnp.sum(params**2))
    with pytest.raises(TypeError, match="static_args='loss_fn'"):
        tx.init(jnp.ones(2))


@pytest.mark.parametrize("array", [jnp.ones(1000, bool), np.ones((2, 500))])
def test_an_array_for_a_mask_is_an_error_with_its_path_and_no_elements(array):
    tx = sam(loss_fn, mask={"w": True, "b": array})
    with pytest.raises(TypeError, match=r"mask must have True or False.*\[.*\] at \['b'\].*sparse_ascent") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert len(str(error.value)) < 200
    with pytest.raises(TypeError, match=r"bool arrays.*float32\[2\] at \['w'\]"):
        sparse_ascent({"w": jnp.ones(2)})


# Arguments that are close to optional ones


def scaled(params, batch=1.0, scale=1.0, key=None):
    return scale * jnp.sum(params["w"]) * batch


@pytest.mark.parametrize("name", MEMBERS)
def test_an_argument_close_to_an_optional_one_warns_once_a_trace(name):
    tx = MEMBERS[name](scaled)
    step = jax.jit(lambda params, state: tx.update(params, state, params, scael=2.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step(PARAMS, tx.init(PARAMS))
    [found] = [one for one in caught if issubclass(one.category, UserWarning)]
    assert all(part in str(found.message) for part in ("'scael'", "'scale'", "scaled(params"))


@pytest.mark.parametrize(
    "given",
    [{"scale": 1.0, "scael": 1.0}, {"value": 1.0}, {"labels": 1.0}, {"step": 1, "rngs": 0}, {"value_fn": None, "k": 1}],
)
def test_other_arguments_do_not_warn(given):
    tx = sam(scaled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **given)
        sam(lambda params, scale=1.0, **rest: jnp.sum(params["w"])).update(
            PARAMS, tx.init(PARAMS), PARAMS, scael=1.0
        )  # it gets it


# What a first try gets wrong


def test_an_optimizer_in_the_place_of_a_number_is_an_error_that_shows_the_chain():
    with pytest.raises(TypeError, match=r"rho must be a real number, got an optimizer.*optax.chain\(sam\(loss_fn\)"):
        sam(loss_fn, optax.sgd(0.1))


def test_a_fraction_without_the_total_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"got 0\.85; a fraction needs total_steps too"):
        late(sam(loss_fn), 0.85)


def test_a_loss_that_takes_arguments_by_position_is_told_that_they_come_by_name():
    def starred(params, *batch):
        return jnp.sum(params["w"] * batch[0])

    tx = sam(starred)
    with pytest.raises(IndexError) as caught:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert "*batch, which gets nothing" in caught.value.__notes__[0]


def test_a_loss_that_calls_params_as_a_model_is_told_what_it_gets():
    class Tree(dict):
        pass

    jax.tree_util.register_pytree_node(
        Tree,
        lambda tree: (tuple(tree.values()), tuple(tree)),
        lambda keys, leaves: Tree(zip(keys, leaves, strict=True)),
    )
    tx, params = sam(lambda model, x: jnp.sum(model(x))), Tree(PARAMS)
    with pytest.raises(TypeError, match="object is not callable") as caught:
        tx.update(params, tx.init(params), params, x=1.0)
    assert "not as a model" in caught.value.__notes__[0]
