"""A step in the manner of each framework gives the method's gradient, whatever it passes to the optimizer.

Every step here is of our own making; `docs/how-to/frameworks` says which framework calls the optimizer so.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crsam_jax
from crsam_jax import sharpened
from tests.core.problems import mlp

LOSS_FN, PARAMS, BATCH = mlp(examples=16)
METHODS = {"sam": crsam_jax.sam, "crsam": crsam_jax.crsam}
RHO = 0.3
SGD = optax.sgd(1.0)  # an update is minus the gradient


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def gradient(method, loss_fn=LOSS_FN, params=PARAMS, **inputs):
    """The method's, from its optax stage called as the documentation says."""
    inputs = inputs or {"batch": BATCH}
    loss, grads = jax.value_and_grad(loss_fn)(params, **inputs)
    tx = method(loss_fn, rho=RHO)
    return tx.update(grads, tx.init(params), params, loss=loss, **inputs)[0]


def negative(tree):
    return jax.tree.map(jnp.negative, tree)


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def test_the_method_is_not_the_plain_gradient(method):
    difference = jax.tree.map(jnp.subtract, gradient(method), jax.grad(LOSS_FN)(PARAMS, BATCH))
    assert optax.tree.norm(difference) > 0.01


# A loss whose gradient is the method's: nothing is passed to the optimizer.


def test_update_without_params(method):
    """Brax: ``optimizer.update(grads, state)``."""

    def step(loss_fn, params, batch):
        grads = jax.grad(loss_fn)(params, batch)
        return SGD.update(grads, SGD.init(params))[0]

    assert_equal(
        jax.jit(step, static_argnums=0)(sharpened(LOSS_FN, method, rho=RHO), PARAMS, BATCH), negative(gradient(method))
    )


def test_a_loss_that_is_made_in_the_step_and_closes_over_the_batch(method):
    """big_vision, scenic, flax's lm1b: ``def loss_fn(params)`` inside a jitted step."""

    @jax.jit
    def step(params, batch):
        loss_fn = sharpened(lambda params: LOSS_FN(params, batch), method, rho=RHO)
        return jax.value_and_grad(loss_fn)(params)

    loss, grads = step(PARAMS, BATCH)
    assert_equal((loss, grads), (LOSS_FN(PARAMS, BATCH), gradient(method)))


def test_the_gradient_of_several_arguments(method):
    """MaxText: ``argnums=(0, 1)``, where the second tree has values that replace its own."""

    def loss_fn(params, scales, batch):
        return scales["output"] * LOSS_FN(params, batch)

    scales = {"output": jnp.float32(1.5)}
    grads, others = jax.grad(sharpened(loss_fn, method, rho=RHO), argnums=(0, 1))(PARAMS, scales, BATCH)
    assert_equal(grads, gradient(method, loss_fn, scales=scales, batch=BATCH))
    assert_equal(others, jax.grad(loss_fn, argnums=1)(PARAMS, scales, BATCH))


def test_accumulation_outside(method):
    """EasyDeL, MaxText, tunix: a sum of gradients over micro-batches in a scan. Each one has its own perturbation."""
    parts = jax.tree.map(lambda a: a.reshape(4, 4, *a.shape[1:]), BATCH)
    grad_fn = jax.value_and_grad(sharpened(LOSS_FN, method, rho=RHO))

    @jax.jit
    def accumulated(params):
        def add(total, part):
            return jax.tree.map(jnp.add, total, grad_fn(params, part)[1]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.tree.map(lambda g: g / 4, jax.lax.scan(add, zeros, parts)[0])

    each = [gradient(method, batch=jax.tree.map(lambda a, i=i: a[i], parts)) for i in range(4)]
    assert_equal(accumulated(PARAMS), jax.tree.map(lambda *g: sum(g) / 4, *each))


def test_a_multi_transform_that_freezes(method):
    """MaxText's ``trainable_parameters_mask``: what is frozen must be left out of the perturbation too."""
    is_first = {name: name == "first" for name in PARAMS}
    labels = {name: "train" if first else "freeze" for name, first in is_first.items()}
    tx = optax.multi_transform({"train": SGD, "freeze": optax.set_to_zero()}, labels)
    grads = jax.grad(sharpened(LOSS_FN, method, rho=RHO, mask=is_first))(PARAMS, BATCH)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    stage = method(LOSS_FN, rho=RHO, mask=is_first)
    expected, _ = stage.update(jax.grad(LOSS_FN)(PARAMS, BATCH), stage.init(PARAMS), PARAMS, batch=BATCH)
    assert_equal(updates["first"], negative(expected["first"]))
    assert optax.tree.norm({name: updates[name] for name in PARAMS if not is_first[name]}) == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Context:
    params: dict
    batch: tuple
    step: jax.Array


def test_the_gradient_over_a_context(method):
    """Kauldron: the differentiated argument holds params, batch and step. Its params are the loss's first argument."""

    def loss_and_context(context):
        return LOSS_FN(context.params, context.batch), dataclasses.replace(context, step=context.step + 1)

    def loss_fn(params, context):
        return loss_and_context(dataclasses.replace(context, params=params))

    def sharp(context):
        return sharpened(loss_fn, method, rho=RHO, has_aux=True)(context.params, context)

    context = Context(PARAMS, BATCH, jnp.int32(3))
    grads, new = jax.jit(jax.grad(sharp, has_aux=True, allow_int=True))(context)
    assert_equal(grads.params, gradient(method))
    assert new.step == 4


def test_train_state_under_pmap_with_batch_norm(method):
    """Flax's ImageNet example and scenic: each device perturbs for its own part of the batch."""
    linen, train_state = pytest.importorskip("flax.linen"), pytest.importorskip("flax.training.train_state")
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x, train=True):
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x)))
            return linen.Dense(3)(x)

    network = Network()
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 4)), jnp.arange(16).reshape(2, 8) % 3
    variables = network.init(jax.random.key(1), x[0])
    params, stats = variables["params"], variables["batch_stats"]

    def loss_fn(params, stats, x, y):
        logits, new = network.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

    def step(state, stats, x, y):
        sharp = sharpened(lambda params: loss_fn(params, stats, x, y), method, rho=RHO, has_aux=True)
        (_, stats), grads = jax.value_and_grad(sharp, has_aux=True)(state.params)
        state = state.apply_gradients(grads=jax.lax.pmean(grads, "batch"))
        return state, jax.lax.pmean(stats, "batch")

    state = train_state.TrainState.create(apply_fn=network.apply, params=params, tx=SGD)
    copies = jax.tree.map(lambda a: jnp.stack([a, a]), (state, stats))
    new, new_stats = jax.pmap(step, axis_name="batch", devices=jax.devices()[:2])(*copies, x, y)
    found = jax.tree.map(lambda a, b: a[0] - b, new.params, params)
    plain = lambda params, **inputs: loss_fn(params, **inputs)[0]
    each = [gradient(method, plain, params, stats=stats, x=x[i], y=y[i]) for i in range(2)]
    assert_equal(found, jax.tree.map(lambda *g: -sum(g) / 2, *each))
    expected = [loss_fn(params, stats, x[i], y[i])[1] for i in range(2)]  # at w, once
    assert_equal(jax.tree.map(lambda a: a[0], new_stats), jax.tree.map(lambda *s: sum(s) / 2, *expected))


def test_an_nnx_step_with_dropout_and_batch_norm(method):
    """Flax's MNIST example: the model is split before the pass, and the generator of random keys is cloned in it."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.dropout, self.output = nnx.Dropout(0.3), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x, rngs):
            return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x))), rngs=rngs))

    def loss_fn(model, x, y, rngs):
        logits = model(x, rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

    @nnx.jit
    def step(model, optimizer, x, y, rngs):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        now = rngs.fork()

        def pure_loss_fn(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            loss, logits = loss_fn(model, x, y, nnx.clone(now))
            return loss, (logits, nnx.state(model, nnx.Not(nnx.Param)))

        sharp = sharpened(pure_loss_fn, method, has_aux=True, rho=RHO)
        (loss, (_, new)), grads = jax.value_and_grad(sharp, has_aux=True)(params)
        nnx.update(model, new)
        optimizer.update(model, grads)
        return loss

    x, y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3
    model, rngs = Network(nnx.Rngs(0)), nnx.Rngs(5)
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    graphdef, params, rest = jax.tree.map(jnp.copy, nnx.split(model, nnx.Param, ...))
    key = nnx.clone(rngs).fork()

    def plain(params, x, y):
        network = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(network, x, y, nnx.clone(key))[0]

    clean = nnx.merge(graphdef, params, rest, copy=True)
    loss, _ = loss_fn(clean, x, y, nnx.clone(key))
    assert_equal(step(model, optimizer, x, y, rngs), loss)
    found = jax.tree.map(jnp.subtract, nnx.state(model, nnx.Param), params)
    assert_equal(found, negative(gradient(method, plain, params, x=x, y=y)))
    assert_equal(nnx.state(model, nnx.BatchStat), nnx.state(clean, nnx.BatchStat))  # one update, at w
    first = jnp.copy(rngs.default.count[...])
    step(model, optimizer, x, y, rngs)
    assert rngs.default.count[...] == first + 1


def test_a_loss_of_an_nnx_module(method):
    """Tunix, flax's Gemma: ``nnx.value_and_grad(loss_fn)(model, ...)``, or the gradient of some of its variables."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.LoRALinear(4, 8, lora_rank=2, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
            self.output = nnx.LoRALinear(8, 3, lora_rank=2, rngs=rngs)

        def __call__(self, x):
            return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))

    def loss_fn(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    x, y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3
    for trained in (nnx.Param, nnx.LoRAParam):

        def sharp_loss_fn(model, x, y, trained=trained):
            graphdef, params, rest = nnx.split(model, trained, ...)

            def pure_loss_fn(params, rest):
                model = nnx.merge(graphdef, params, rest, copy=True)
                return loss_fn(model, x, y), nnx.state(model, nnx.Not(trained))

            loss, new = sharpened(pure_loss_fn, method, has_aux=True, rho=RHO)(params, rest)
            nnx.update(model, new)
            return loss

        @nnx.jit
        def step(model, optimizer, trained=trained, sharp_loss_fn=sharp_loss_fn):
            loss, grads = nnx.value_and_grad(sharp_loss_fn, argnums=nnx.DiffState(0, trained))(model, x, y)
            optimizer.update(model, grads)
            return loss

        model = Network(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, SGD, wrt=trained)
        graphdef, params, rest = jax.tree.map(jnp.copy, nnx.split(model, trained, ...))
        plain = lambda params, y: loss_fn(nnx.merge(graphdef, params, rest, copy=True), x, y)
        clean = nnx.merge(graphdef, params, rest, copy=True)
        assert_equal(step(model, optimizer), loss_fn(clean, x, y))
        found = jax.tree.map(jnp.subtract, nnx.state(model, trained), params)
        assert_equal(found, negative(gradient(method, plain, params, y=y)))
        assert_equal(nnx.state(model, nnx.BatchStat), nnx.state(clean, nnx.BatchStat))  # one update, at w
        assert model.dropout.rngs.count[...] == clean.dropout.rngs.count[...]


# A loss that arrives at update: the method is a stage of the optimizer.


@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_a_loss_at_update(method, name):
    """Levanter: ``update(grads, state, params=..., obj_fn=loss_of_params, loss=loss)``; optax's own name: value_fn."""
    tx = optax.chain(method(rho=RHO), SGD)

    @jax.jit
    def step(params, state, batch):
        loss_of_params = lambda params: LOSS_FN(params, batch)
        loss, grads = jax.value_and_grad(loss_of_params)(params)
        return tx.update(grads, state, params=params, loss=loss, grams=None, **{name: loss_of_params})

    updates, state = step(PARAMS, tx.init(PARAMS), BATCH)
    assert_equal(updates, negative(gradient(method)))
    assert optax.tree.get(state, "mismatched_steps") == 0


def keeps_the_loss(inner):
    """A wrapper that skips spikes in the manner of MaxText's: it takes ``loss`` and ``grad_norm`` for itself."""

    def update(updates, state, params=None, **extra):
        loss = extra.pop("loss")
        extra.pop("grad_norm", None)
        new, after = inner.update(updates, state["inner"], params, **extra)
        is_ok = loss < state["limit"]
        kept = jax.tree.map(lambda a, b: jnp.where(is_ok, a, b), after, state["inner"])
        return jax.tree.map(lambda u: jnp.where(is_ok, u, 0), new), state | {"inner": kept}

    return optax.GradientTransformationExtraArgs(
        lambda params: {"inner": inner.init(params), "limit": jnp.float32(100.0)}, update
    )


def test_a_wrapper_that_takes_the_loss_for_itself(method):
    """The method then evaluates the loss at w once more, and gives the same gradient."""
    tx = keeps_the_loss(optax.chain(method(LOSS_FN, rho=RHO), SGD))
    loss, grads = jax.value_and_grad(LOSS_FN)(PARAMS, BATCH)
    updates, state = jax.jit(tx.update)(
        grads, tx.init(PARAMS), PARAMS, loss=loss, grad_norm=optax.tree.norm(grads), batch=BATCH
    )
    assert_equal(updates, negative(gradient(method)))
    assert optax.tree.get(state, "mismatched_steps") == 0
    assert_equal(optax.tree.get(state, "diagnostics").loss, loss)


def test_keywords_only(method):
    """EasyDeL: ``tx.update(updates=grads, state=state, params=params)``."""
    grads = jax.grad(sharpened(LOSS_FN, method, rho=RHO))(PARAMS, BATCH)
    updates, _ = SGD.update(updates=grads, state=SGD.init(PARAMS), params=PARAMS)
    assert_equal(updates, negative(gradient(method)))
    tx = optax.chain(method(LOSS_FN, rho=RHO), SGD)
    grads = jax.grad(LOSS_FN)(PARAMS, BATCH)
    updates, _ = tx.update(updates=grads, state=tx.init(PARAMS), params=PARAMS, batch=BATCH)
    assert_equal(updates, negative(gradient(method)))


def test_a_name_of_a_mesh_axis_for_one_perturbation_of_the_whole_batch(method):
    """Scenic, with the stage: gradients are averaged over devices before update, so the perturbation is too."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    tx = optax.chain(method(LOSS_FN, rho=RHO, execution=crsam_jax.Execution(axis_name="batch")), SGD)

    def step(params, batch):
        grads = jax.lax.pmean(jax.grad(LOSS_FN)(params, batch), "batch")
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    parts = jax.tree.map(lambda a: a.reshape(2, 8, *a.shape[1:]), BATCH)
    found = jax.pmap(step, axis_name="batch", in_axes=(None, 0), devices=jax.devices()[:2])(PARAMS, parts)
    assert_equal(jax.tree.map(lambda a: a[0], found), negative(gradient(method)))


# Loss scaling


@pytest.mark.parametrize("settings", [{}, {"penalty": "linear"}])
def test_a_scale_inside_the_loss(settings):
    """Keras scales inside: the linear form does not notice, the logarithm does."""
    scale = 1024.0
    inside = sharpened(lambda params, batch: scale * LOSS_FN(params, batch), crsam_jax.crsam, rho=RHO, **settings)
    outside = lambda params, batch: scale * sharpened(LOSS_FN, crsam_jax.crsam, rho=RHO, **settings)(params, batch)
    stage = crsam_jax.crsam(LOSS_FN, rho=RHO, **settings)
    right, _ = stage.update(jax.grad(LOSS_FN)(PARAMS, BATCH), stage.init(PARAMS), PARAMS, batch=BATCH)
    unscaled = lambda loss_fn: jax.tree.map(lambda g: g / scale, jax.grad(loss_fn)(PARAMS, BATCH))
    assert_equal(unscaled(outside), right)
    if settings:
        assert_equal(unscaled(inside), right)
    else:
        difference = jax.tree.map(jnp.subtract, unscaled(inside), right)
        assert optax.tree.norm(difference) > 1e-3 * optax.tree.norm(right)
