"""Bad input never passes silently, and the message names the fix."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import Execution, adaptive_ascent, asam, crsam, crsam_gradient, gradient_norm_penalty, gsam, sam, wsam
from tests.problems import MEMBERS

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
@pytest.mark.parametrize("bad", [None, 3.0, jnp.ones(2)])
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
