"""Set-ups drawn at random: right ones train as their parts say and pass the check, each mistake is named."""

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import crsam_jax
from crsam_jax import Execution, ascents, check_setup, random_probes
from tests.core.problems import flat

# The parts of a set-up.

WITH_ASCENT = {
    "sam": crsam_jax.sam,
    "sam on a part": partial(crsam_jax.sam, ascent_only=True),
    "stable_sam": crsam_jax.stable_sam,
    "wsam": crsam_jax.wsam,
    "gsam": crsam_jax.gsam,
    "gradient_norm_penalty": crsam_jax.gradient_norm_penalty,
    "crsam": crsam_jax.crsam,
    "crsam, linear": partial(crsam_jax.crsam, penalty="linear"),
    "crsam, gradients": partial(crsam_jax.crsam, differences="gradients"),
}
METHODS = {
    **WITH_ASCENT,
    "asam": crsam_jax.asam,
    "rsam": crsam_jax.rsam,
    "le_sam": lambda loss_fn, rho, **options: crsam_jax.le_sam(loss_fn, sigma=rho, **options),
    "multi_step_sam": crsam_jax.multi_step_sam,
    "random probes": partial(crsam_jax.crsam, probes=random_probes(1, 0.01)),
}
ASCENTS = {
    "gradient": ascents.gradient_ascent,
    "adaptive": ascents.adaptive_ascent,
    "smoothed": ascents.smoothed_ascent,
    "dropped": ascents.dropped_ascent,
    "friendly": ascents.friendly_ascent,
    "momentum": ascents.momentum_ascent,
    "suppressed": ascents.variance_suppressed_ascent,
    "preconditioned": ascents.preconditioned_ascent,
    "random weights": ascents.random_weight_ascent,
}
POLICIES = {
    "none": lambda tx: tx,
    "periodic": partial(crsam_jax.periodic, k=2),
    "look": partial(crsam_jax.look, k=2),
    "late": partial(crsam_jax.late, start=2),
    "adaptive": crsam_jax.adaptive_policy,
}
LINKS = {
    "clip": lambda: optax.clip_by_global_norm(0.5),
    "decay": lambda: optax.add_decayed_weights(1e-3),
    "adam": lambda: optax.scale_by_adam(eps=1e-3),  # the usual 1e-8 is zero in float16
    "momentum": lambda: optax.trace(0.9),
    "centralize": optax.centralize,
}
DTYPES = ["float64", "float32", "bfloat16", "float16"]
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
LAYOUTS = ["tuple", "dict", "nested", "with None", "one"]


class SetUp(NamedTuple):
    """What a user chooses."""

    method: str
    ascent: str
    policy: str
    links: list[str]
    strategy: str
    dtype: str
    layout: str
    seed: int

    @property
    def takes_ascent(self):
        return self.method in WITH_ASCENT

    def method_for(self, loss_fn, rho=0.01, strategy=None):
        options: dict[str, Any] = {"execution": Execution(strategy or self.strategy)}
        if self.takes_ascent:
            options["ascent"] = ASCENTS[self.ascent]()
        return POLICIES[self.policy](METHODS[self.method](loss_fn, rho, **options))

    def behind(self):
        return [LINKS[name]() for name in self.links] + [optax.scale(-0.05)]


set_ups = st.builds(
    SetUp, st.sampled_from(list(METHODS)), st.sampled_from(list(ASCENTS)), st.sampled_from(list(POLICIES)),
    st.lists(st.sampled_from(list(LINKS)), max_size=2, unique=True),
    st.sampled_from(["auto", "sequential", "ordered", "vmap"]), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS),
    st.integers(0, 1000),
).filter(lambda set_up: not (set_up.method == "sam on a part" and set_up.policy in ("adaptive", "look")))  # fmt: skip


def packed(layout, first, bias, second):
    """Params of a network in one of several trees."""
    return {
        "tuple": lambda: (first, bias, second),
        "dict": lambda: {"first": first, "bias": bias, "second": second},
        "nested": lambda: {"a": [{"w": first}, (bias,)], "b": {"w": second}},
        "with None": lambda: {"first": first, "off": None, "bias": bias, "second": second},
        "one": lambda: jnp.concatenate([jnp.ravel(leaf) for leaf in (first, bias, second)]),
    }[layout]()


def unpacked(layout, params):
    leaves = jax.tree.leaves(params)
    if layout == "one":
        return leaves[0][:20].reshape(4, 5), leaves[0][20:25], leaves[0][25:].reshape(5, 3)
    if layout in ("dict", "with None"):  # in the order of the keys
        bias, first, second = leaves
        return first, bias, second
    return leaves


def network(layout, params, x):
    """Logits, in float32 at least: a loss in half precision is another mistake."""
    first, bias, second = (leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in unpacked(layout, params))
    return jnp.tanh(x @ first + bias) @ second


def problem(set_up):
    """A loss of a small network, its params, and batches."""
    rng = np.random.default_rng(set_up.seed)
    leaves = [jnp.asarray(rng.normal(size=shape) / 2, set_up.dtype) for shape in ((4, 5), (5,), (5, 3))]

    def loss_fn(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(network(set_up.layout, params, x), y).mean()

    wide = jnp.promote_types(set_up.dtype, jnp.float32)
    batch = lambda: {"x": jnp.asarray(rng.normal(size=(16, 4)), wide), "y": jnp.asarray(rng.integers(0, 3, 16))}
    return loss_fn, packed(set_up.layout, *leaves), [batch() for _ in range(3)]


def checked(tx, loss_fn, params, grads, loss, **batch):
    """What ``check_setup`` prints, or says is wrong."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            check_setup(tx, loss_fn, params, grads=grads, loss=loss, **batch)
    except ValueError as error:
        return str(error)
    return printed.getvalue()


def is_right(set_up):
    """A chain does what its parts do one by one, by any strategy; nothing is counted but momentum's first step."""
    loss_fn, params, batches = problem(set_up)
    method, links = set_up.method_for(loss_fn, strategy="sequential"), set_up.behind()
    alone = jax.jit(method.update)
    tx = optax.chain(set_up.method_for(loss_fn), *set_up.behind())
    update, gradient = jax.jit(tx.update), jax.jit(jax.value_and_grad(loss_fn))
    state, method_state, link_states = tx.init(params), method.init(params), [link.init(params) for link in links]
    for batch in batches:
        loss, grads = gradient(params, **batch)
        updates, state = update(grads, state, params, loss=loss, **batch)
        expected, method_state = alone(grads, method_state, params, loss=loss, **batch)
        for index, link in enumerate(links):
            expected, link_states[index] = link.update(expected, link_states[index], params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert [leaf.dtype for leaf in jax.tree.leaves(updates)] == [leaf.dtype for leaf in jax.tree.leaves(params)]
        found, wanted = flat(updates), flat(expected)
        assert np.linalg.norm(found - wanted) <= TOLERANCE[set_up.dtype] * np.linalg.norm(wanted)
        params = optax.apply_updates(params, updates)
    assert optax.tree.get(state, "guarded_steps") == (set_up.ascent == "momentum" and set_up.takes_ascent)
    assert optax.tree.get(state, "mismatched_steps", 0) == 0
    loss, grads = gradient(params, **batches[0])
    said = checked(tx, loss_fn, params, None if "part" in set_up.method else grads, loss, **batches[0])
    assert said.startswith("This set-up is right"), said


# Mistakes.


class Case(NamedTuple):
    """A right set-up, from which a mistake takes what it does not change."""

    set_up: SetUp
    loss_fn: Any
    grads: Any
    loss: Any
    other_grads: Any
    """Of another batch."""

    def method(self):
        return self.set_up.method_for(self.loss_fn)

    def chain(self, *before, loss_fn=None):
        return optax.chain(*before, self.set_up.method_for(loss_fn or self.loss_fn), *self.set_up.behind())

    def smoothed(self, params, x, y):
        return 0.9 * self.loss_fn(params, x, y) + 0.1 * self.loss_fn(params, x, (y + 1) % 3)


# The optimizer that a case becomes, and what is said of it.
WRONG_OPTIMIZERS = {
    "clipping before the method": (lambda case: case.chain(optax.clip_by_global_norm(1e-3)), "Put the method first"),
    "weight decay before the method": (
        lambda case: case.chain(optax.add_decayed_weights(0.3)),
        "Put the method first|turns the gradient",
    ),
    "an optimizer before the method": (
        lambda case: case.chain(optax.adam(1e-3)),
        "Put the method first|turns the gradient",
    ),
    "the method twice": (lambda case: case.chain(case.method()), "2 sharpness-aware methods"),
    "nothing that goes downhill": (lambda case: optax.chain(case.method(), optax.scale_by_adam()), "point uphill"),
    "accumulation around the method": (
        lambda case: optax.MultiSteps(case.chain(), 2).gradient_transformation(),
        "MultiSteps stands around",
    ),
    "no method": (lambda case: optax.chain(*case.set_up.behind()), "holds no sharpness-aware method"),
    "another loss in the method": (lambda case: case.chain(loss_fn=case.smoothed), "built with another loss"),
    "a mean of gradients before the method": (
        lambda case: case.chain(optax.ema(0.9, debias=True)),
        "a transformation before it",
    ),
}
# The gradient and the loss that are passed, and what is said of them.
WRONG_NUMBERS = {
    "the gradient twice as long": (
        lambda case: (jax.tree.map(lambda g: 2 * g, case.grads), case.loss),
        "grads are 2 times",
    ),
    "the gradient of another batch": (lambda case: (case.other_grads, case.loss), "grads are not the gradient"),
    "the loss summed": (lambda case: (case.grads, 16 * case.loss), "loss= is"),
}
MISTAKES = [*WRONG_NUMBERS, *WRONG_OPTIMIZERS]


def is_named(set_up, mistake):
    assume(not (set_up.method == "sam on a part" and mistake == "another loss in the method"))  # it needs no loss
    loss_fn, params, batches = problem(set_up)
    (loss, grads), (_, other_grads) = (jax.value_and_grad(loss_fn)(params, **batch) for batch in batches[:2])
    case = Case(set_up, loss_fn, grads, loss, other_grads)
    if mistake in WRONG_NUMBERS:
        make, message = WRONG_NUMBERS[mistake]
        tx, (grads, loss) = case.chain(), make(case)
    else:
        make, message = WRONG_OPTIMIZERS[mistake]
        tx = make(case)
    said = checked(tx, loss_fn, params, grads, loss, **batches[0])
    assert said.startswith("This set-up is wrong"), f"{mistake}: {said}"
    assert any(part in said for part in message.split("|")), f"{mistake}: {said}"


# Each set-up is compiled, so a failing one is shown as it was drawn.
phases = [Phase.explicit, Phase.reuse, Phase.generate]


def with_dtype(set_up, test, *arguments):
    with jax.enable_x64(set_up.dtype == "float64"):
        test(set_up, *arguments)


@settings(max_examples=5, phases=phases)
@given(set_ups)
def test_a_right_set_up_is_right(set_up):
    with_dtype(set_up, is_right)


@settings(max_examples=8, phases=phases)
@given(set_ups, st.sampled_from(MISTAKES))
def test_a_mistake_is_named(set_up, mistake):
    with_dtype(set_up, is_named, mistake)


@pytest.mark.slow
@settings(max_examples=30, phases=phases)
@given(set_ups)
def test_many_right_set_ups_are_right(set_up):
    with_dtype(set_up, is_right)


@pytest.mark.slow
@settings(max_examples=60, phases=phases)
@given(set_ups, st.sampled_from(MISTAKES))
def test_many_mistakes_are_named(set_up, mistake):
    with_dtype(set_up, is_named, mistake)


# What no check of one batch can see; the page on check_setup lists each with the reason.

USUAL = SetUp("crsam", "gradient", "none", [], "auto", "float32", "dict", 0)


def _chain(loss_fn):
    return optax.chain(USUAL.method_for(loss_fn), *USUAL.behind())


def _clipping_that_does_not_act(loss_fn, params, batch):
    return optax.chain(optax.clip_by_global_norm(100.0), _chain(loss_fn)), loss_fn


def _mask_of_the_wrong_leaves(loss_fn, params, batch):
    mask = {"first": False, "bias": True, "second": False}
    return optax.chain(crsam_jax.crsam(loss_fn, mask=mask), optax.sgd(0.1)), loss_fn


def _smoothing_in_both_losses(loss_fn, params, batch):
    smooth = lambda params, x, y: 0.9 * loss_fn(params, x, y) + 0.1 * loss_fn(params, x, (y + 1) % 3)
    return _chain(smooth), smooth


def _batch_closed_over(loss_fn, params, batch):
    first = lambda params, x, y: loss_fn(params, **batch)
    return _chain(first), first


def _labels_of_other_examples(loss_fn, params, batch):
    batch["y"] = jnp.roll(batch["y"], 1)
    return _chain(loss_fn), loss_fn


def _radius_too_small_to_matter(loss_fn, params, batch):
    return optax.chain(crsam_jax.sam(loss_fn, rho=1e-6), optax.sgd(0.1)), loss_fn


def _another_loss_with_ascent_only(loss_fn, params, batch):
    other = lambda params, x, y: 2 * loss_fn(params, x, y)
    return optax.chain(crsam_jax.sam(other, ascent_only=True), optax.sgd(0.1)), loss_fn


UNSEEN = {
    "clipping before the method that does not act yet": _clipping_that_does_not_act,
    "a mask of the wrong leaves": _mask_of_the_wrong_leaves,
    "the same wrong loss in both places": _smoothing_in_both_losses,
    "a batch that the loss closes over": _batch_closed_over,
    "inputs with the labels of others": _labels_of_other_examples,
    "a radius or learning rate that is too small": _radius_too_small_to_matter,
    "another loss in a method with `ascent_only=True`": _another_loss_with_ascent_only,
}


@pytest.mark.parametrize("mistake", UNSEEN)
def test_what_no_check_of_one_batch_sees_is_listed(mistake):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "check.md").read_text()
    loss_fn, params, batches = problem(USUAL)
    batch = batches[0]
    tx, loss_fn = UNSEEN[mistake](loss_fn, params, batch)
    loss, grads = jax.value_and_grad(loss_fn)(params, **batch)
    assert checked(tx, loss_fn, params, grads, loss, **batch).startswith("This set-up is right")
    assert f"| {mistake} |" in page
