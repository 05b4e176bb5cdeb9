"""The loss gets its arguments by name, and what it returns is checked."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from crsam_jax._loss import LossBinder
from tests.core.problems import MEMBERS

PARAMS = jnp.array([1.0, 2.0])


def total(params, factor):
    return factor * jnp.sum(params)


def test_positional_or_keyword_arguments_are_taken_by_name():
    def loss_fn(params, first, second):
        return first * params[0] + 10 * second * params[1]

    assert LossBinder(loss_fn, False)({"second": 3.0, "first": 2.0})(PARAMS) == 62


def test_keyword_only_arguments_are_taken_by_name():
    def loss_fn(params, *, factor):
        return factor * jnp.sum(params)

    assert LossBinder(loss_fn, False)({"factor": 2.0})(PARAMS) == 6


def test_defaults_hold_until_the_argument_is_given():
    def loss_fn(params, factor=1.0, *, shift=0.0):
        return factor * jnp.sum(params) + shift

    assert LossBinder(loss_fn, False)({})(PARAMS) == 3
    assert LossBinder(loss_fn, False)({"shift": 1.0, "factor": 2.0})(PARAMS) == 7


def test_the_first_parameter_may_have_any_name_or_be_positional_only():
    def loss_fn(w, /, factor):
        return total(w, factor)

    assert LossBinder(loss_fn, False)({"factor": 2.0})(PARAMS) == 6


@pytest.mark.parametrize("bound", [partial(total, factor=5.0), partial(lambda f, params: total(params, f), 5.0)])
def test_partial_arguments_stay_bound(bound):
    assert LossBinder(bound, False)({"other": 1.0})(PARAMS) == 15


def test_bound_methods_and_callable_objects_work():
    class Model:
        factor = 4.0

        def loss(self, params, shift):
            return total(params, self.factor) + shift

        __call__ = loss

    assert LossBinder(Model().loss, False)({"shift": 1.0})(PARAMS) == 13
    assert LossBinder(Model(), False)({"shift": 1.0})(PARAMS) == 13


def test_jitted_losses_show_their_signature():
    assert LossBinder(jax.jit(total), False)({"factor": 2.0, "batch": None})(PARAMS) == 6


def test_arguments_for_other_links_of_the_chain_are_ignored():
    assert LossBinder(total, False)({"factor": 2.0, "value": 0.0, "grad_fn": None, "batch": 1})(PARAMS) == 6


def test_kwargs_get_everything_but_the_reserved_names():
    seen = {}

    def loss_fn(params, factor, **kwargs):
        seen.update(kwargs)
        return total(params, factor)

    LossBinder(loss_fn, False)({"factor": 1.0, "batch": 2, "value": 3, "grad": 4, "value_fn": 5, "rng": 6})(PARAMS)
    assert seen == {"batch": 2, "rng": 6}


@pytest.mark.parametrize("name", ["value", "grad", "value_fn"])
def test_a_reserved_name_reaches_a_loss_that_names_it(name):
    namespace = {}
    exec(f"def loss_fn(params, {name}, **kwargs): return params[0] * {name}", namespace)
    assert LossBinder(namespace["loss_fn"], False)({name: 7.0})(PARAMS) == 7


def test_a_missing_argument_is_named_with_what_was_given_and_the_close_match():
    def loss_fn(params, batch, rng):
        return jnp.sum(params)

    with pytest.raises(TypeError) as error:
        LossBinder(loss_fn, False)({"batches": 1, "step": 2})
    for part in ("'batch'", "'rng'", "'batches'", "'step'", "Did you mean 'batch'", "batch=..., rng=..."):
        assert part in str(error.value)
    assert "Did you mean 'rng'" not in str(error.value)


def test_a_missing_argument_says_so_where_none_was_given():
    with pytest.raises(TypeError, match=r"'factor'.*no extra arguments"):
        LossBinder(total, False)({})


def test_positional_only_arguments_are_an_error_at_construction():
    def loss_fn(params, batch, /):
        return jnp.sum(params)

    with pytest.raises(TypeError, match="positional-only argument 'batch'"):
        LossBinder(loss_fn, False)


@pytest.mark.parametrize("loss_fn", [lambda: 0.0, lambda *, params: 0.0, lambda **kwargs: 0.0])
def test_a_loss_without_params_is_an_error_at_construction(loss_fn):
    with pytest.raises(TypeError, match="params as its first positional argument"):
        LossBinder(loss_fn, False)


@pytest.mark.parametrize("name", ["updates", "state"])
def test_a_required_argument_that_update_cannot_pass_on_is_an_error_at_construction(name):
    namespace = {}
    exec(f"def loss_fn(params, {name}): return params[0]", namespace)
    with pytest.raises(TypeError, match=f"'{name}'.*rename"):
        LossBinder(namespace["loss_fn"], False)
    LossBinder(partial(namespace["loss_fn"], **{name: 1}), False)  # bound, it is no obstacle


@pytest.mark.parametrize("name", MEMBERS)
def test_update_binds_by_name_and_ignores_value(name):
    tx = MEMBERS[name](total)
    state = tx.init(PARAMS)
    _, new_state = tx.update(jnp.full(2, 3.0), state, PARAMS, value=100.0, factor=3.0, unrelated="x")
    assert new_state.diagnostics.loss == 9


def test_update_of_a_chain_hands_the_arguments_through():
    tx = optax.chain(MEMBERS["crsam"](total), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"'factor'.*'factors'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, factors=1.0)


# What the loss returns


def returning(result, has_aux=False):
    return LossBinder(lambda params: result, has_aux)({})(PARAMS)


def test_has_aux_drops_the_aux():
    assert returning((jnp.array(2.0), {"anything": object()}), has_aux=True) == 2


def test_aux_without_has_aux_is_an_error_that_names_both():
    with pytest.raises(TypeError, match=r"has_aux=True.*\(loss, aux\)"):
        returning((jnp.array(2.0), {}))


@pytest.mark.parametrize("result", [jnp.array(2.0), (jnp.array(2.0),), (jnp.array(2.0), 1, 2), jnp.ones(2)])
def test_has_aux_without_aux_is_an_error_that_names_both(result):
    with pytest.raises(TypeError, match=r"has_aux=True.*\(loss, aux\)"):
        returning(result, has_aux=True)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
def test_a_loss_that_is_no_scalar_is_an_error_with_its_shape(shape):
    with pytest.raises(TypeError, match=rf"scalar.*\({shape[0]},"):
        returning(jnp.ones(shape))


@pytest.mark.parametrize("result", [jnp.array(1), jnp.array(True), jnp.array(1j)])
def test_a_loss_that_is_not_real_and_floating_is_an_error_with_its_dtype(result):
    with pytest.raises(TypeError, match=str(result.dtype)):
        returning(result)


@pytest.mark.parametrize("result", [None, {"loss": 1.0}, "low"])
def test_a_loss_that_is_no_array_is_an_error_with_its_type(result):
    with pytest.raises(TypeError, match=type(result).__name__):
        returning(result)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_checks_the_loss_and_has_aux_at_update(name):
    def update(loss_fn, **options):
        tx = MEMBERS[name](loss_fn, **options)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    with pytest.raises(TypeError, match="has_aux"):
        update(lambda params: (jnp.sum(params), None))
    with pytest.raises(TypeError, match="aux"):
        update(lambda params: jnp.sum(params), has_aux=True)
    with pytest.raises(TypeError, match="scalar"):
        update(lambda params: params)
