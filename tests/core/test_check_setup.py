"""``check_setup`` names each mistake, and passes what is right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crsam_jax
from crsam_jax import check_setup, crsam, late, periodic, sam
from tests.core.problems import mlp

LOSS_FN, PARAMS, BATCH = mlp(examples=16)
OTHER = mlp(1, examples=16)[2]
LOSS, GRADS = jax.value_and_grad(LOSS_FN)(PARAMS, BATCH)
SGD = optax.sgd(0.1)


def check(tx, loss_fn=LOSS_FN, **kwargs):
    check_setup(tx, loss_fn, PARAMS, batch=BATCH, **kwargs)


RIGHT = {
    "a member": crsam(LOSS_FN),
    "a chain": optax.chain(crsam(LOSS_FN), optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "a policy": optax.chain(periodic(sam(LOSS_FN), 3), SGD),
    "a policy that begins later": late(sam(LOSS_FN), 0.5, 10),
    "decoupled": crsam_jax.decoupled_wsam(LOSS_FN, SGD, 0.1),
    "random probes": optax.chain(crsam(LOSS_FN, probes=crsam_jax.random_probes(radius=0.1)), SGD),
    "accumulation": optax.chain(sam(LOSS_FN), optax.MultiSteps(SGD, 4).gradient_transformation()),
    "late in a chain": optax.chain(late(crsam(LOSS_FN), 2), SGD),
    "an ascent without a direction in its first step": sam(LOSS_FN, ascent=crsam_jax.ascents.momentum_ascent()),
    "an ascent that is zero where a gradient repeats": sam(LOSS_FN, ascent=crsam_jax.ascents.friendly_ascent()),
    "msam": crsam_jax.msam(SGD),
    "clipping before s2sam": optax.chain(optax.clip_by_global_norm(1.0), crsam_jax.s2sam(SGD)),
    "injected": optax.inject_hyperparams(sam, static_args="loss_fn")(LOSS_FN, rho=0.05),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name):
    check(RIGHT[name], grads=GRADS, loss=LOSS)


WRONG = {
    "scale": ({"grads": jax.tree.map(lambda g: 16 * g, GRADS)}, "grads are 16 times the gradient of loss_fn: summed"),
    "sign": ({"grads": jax.tree.map(lambda g: -0.1 * g, GRADS)}, "point against the gradient of loss_fn, 0.1 times"),
    "batch": ({"grads": jax.grad(LOSS_FN)(PARAMS, OTHER)}, "cosine between them is .* another batch"),
    "zero": ({"grads": jax.tree.map(jnp.zeros_like, GRADS)}, "cosine between them is 0, the ratio of their norms 0"),
    "loss": ({"loss": 2 * LOSS}, "loss= is .*, but loss_fn returns"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_callers_own_numbers(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        check(sam(LOSS_FN), **arguments)


TWICE = sam(lambda params, batch: 2 * LOSS_FN(params, batch))
BROKEN_ELSEWHERE = sam(lambda params, batch: LOSS_FN(params, batch) / (params["first"]["b"][0] == 0))
CHAINS = {
    "behind sgd": (optax.chain(SGD, crsam(LOSS_FN)), "Put the method first"),
    "behind clipping": (optax.chain(optax.clip_by_global_norm(0.1), sam(LOSS_FN), SGD), "and 0.1 where it reaches"),
    "behind decay": (optax.chain(optax.add_decayed_weights(0.1), sam(LOSS_FN), SGD), "Put the method first"),
    "turned": (optax.chain(optax.scale(-1.0), sam(LOSS_FN), SGD), "does not fit the losses that it sees"),
    "inside": (optax.MultiSteps(optax.chain(sam(LOSS_FN), SGD), 4).gradient_transformation(), "MultiSteps stands"),
    "no optimizer": (optax.chain(sam(LOSS_FN), optax.clip_by_global_norm(1.0)), "The updates point uphill"),
    "a policy around a chain": (periodic(optax.chain(crsam(LOSS_FN), SGD), 2), "a policy stands around a whole chain"),
    "a policy around a chain, in one": (
        optax.chain(periodic(optax.chain(crsam(LOSS_FN), SGD), 2), optax.clip_by_global_norm(1.0)),
        "a policy stands around a whole chain",
    ),
    "two methods": (optax.chain(sam(LOSS_FN), crsam(LOSS_FN), SGD), "holds 2 sharpness-aware methods"),
    "behind msam": (optax.chain(crsam_jax.msam(SGD), SGD), "stands behind msam or s2sam"),
    "clipping behind s2sam": (optax.chain(crsam_jax.s2sam(SGD), optax.clip(0.1)), "stands behind msam or s2sam"),
    "nothing to perturb": (
        optax.chain(sam(LOSS_FN, mask=jax.tree.map(lambda _: False, PARAMS)), SGD),
        "mask is False for all params",
    ),
    "no method": (SGD, "holds no sharpness-aware method"),
    "another loss": (
        optax.chain(TWICE, SGD),
        "built with another loss",
    ),
    "skipped": (optax.conditionally_transform(sam(LOSS_FN), lambda step: step > 0), "was not called in a step"),
    "too far": (
        optax.chain(BROKEN_ELSEWHERE, SGD),
        "step fell back",
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain(name):
    tx, message = CHAINS[name]
    with pytest.raises(ValueError, match=message):
        check(tx)


def smoothed(amount):
    """A cross-entropy with this much label smoothing, which moves the loss by a few thousandths."""
    x, y = jax.random.normal(jax.random.key(1), (32, 4)), jnp.arange(32) % 3

    def loss_fn(params):
        labels = optax.smooth_labels(jax.nn.one_hot(y, 3), amount)
        return optax.softmax_cross_entropy(x @ params, labels).mean()

    return loss_fn


@pytest.mark.parametrize("amount", [0.02, 0.1])
def test_label_smoothing_in_one_of_two_losses(amount):
    plain, other, params = smoothed(0.0), smoothed(amount), 0.2 * jax.random.normal(jax.random.key(0), (4, 3))
    check_setup(optax.chain(sam(plain), SGD), plain, params, grads=jax.grad(plain)(params), loss=plain(params))
    with pytest.raises(ValueError, match="tx was built with another loss"):
        check_setup(optax.chain(sam(other), SGD), plain, params)
    with pytest.raises(ValueError, match=r"grads are (not|0\.\d+ times) the gradient"):
        check_setup(optax.chain(sam(plain), SGD), plain, params, grads=jax.grad(other)(params))


def test_a_mean_of_gradients_before_the_method():
    with pytest.raises(ValueError, match=r"In a second step .*mean over steps"):
        check(optax.chain(optax.ema(0.9), sam(LOSS_FN), SGD))
    with pytest.raises(ValueError, match="Put the method first"):
        check(optax.chain(optax.trace(0.9), sam(LOSS_FN), SGD))


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("widened", [False, True])
def test_a_loss_in_half_precision(half, widened):
    def loss_fn(params, batch):
        loss = LOSS_FN(params, batch).astype(half)
        return loss.astype(jnp.float32) if widened else loss

    with pytest.raises(ValueError, match=rf"rounded to {jnp.dtype(half).name}, .* Compute the loss in float32"):
        check(optax.chain(crsam(loss_fn, rho=0.5), SGD), loss_fn)


def test_has_aux_is_found_out(capsys):
    loss_fn = lambda params, batch: (LOSS_FN(params, batch), {"features": batch})
    tx = optax.chain(crsam(loss_fn, has_aux=True), SGD)
    check(tx, loss_fn, grads=GRADS, loss=LOSS)
    check(tx, loss_fn, grads=GRADS, loss=LOSS, has_aux=True)
    with pytest.raises(TypeError, match="pass has_aux=True"):
        check(optax.chain(crsam(loss_fn), SGD), loss_fn)


def test_it_prints_what_it_checked(capsys):
    check(optax.chain(crsam(LOSS_FN), SGD), grads=GRADS, loss=LOSS)
    printed = capsys.readouterr().out
    for part in ("is right", "twice", "grads are its gradient", "loss= is that loss", "second step", "downhill"):
        assert part in printed
    check(crsam(LOSS_FN))
    printed = capsys.readouterr().out
    assert printed.count("not checked") == 2
    assert "put an optimizer behind it" in printed


def test_all_that_is_wrong_is_listed():
    with pytest.raises(ValueError, match="This set-up is wrong") as caught:
        check(CHAINS["behind clipping"][0], grads=jax.grad(LOSS_FN)(PARAMS, OTHER), loss=3 * LOSS)
    assert str(caught.value).count("\n- ") == 3


def test_a_loss_that_is_not_the_same_twice():
    rng = np.random.default_rng(0)
    loss_fn = lambda params, batch: LOSS_FN(params, batch) * rng.uniform(0.5, 1.5)
    with pytest.raises(ValueError, match="for the same arguments"):
        check(sam(loss_fn), loss_fn)


@pytest.mark.parametrize("seed", range(12))
def test_rounding_is_no_other_loss(seed):
    """Loss and value_and_grad, run operation by operation, may differ in the last bits; a loss twice may not."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"a": jax.random.normal(keys[0], (64, 128)) / 8, "b": jax.random.normal(keys[1], (128, 10)) / 11}
    x, labels = jax.random.normal(keys[2], (100, 64)), jnp.arange(100) % 10

    def loss_fn(params, x):
        hidden = x @ params["a"]
        hidden = jax.nn.relu((hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5))
        hidden = jnp.where(jax.random.bernoulli(keys[0], 0.8, hidden.shape), hidden / 0.8, 0)
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["b"], labels).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params, x)
    check_setup(optax.chain(crsam(loss_fn), SGD), loss_fn, params, grads=grads, loss=loss, x=x)


def test_it_says_that_it_does_not_belong_under_jit():
    with pytest.raises(TypeError, match="call it outside, once"):
        jax.jit(lambda params: check_setup(sam(LOSS_FN), LOSS_FN, params, batch=BATCH))(PARAMS)


def test_a_derivative_of_its_own_making():
    loss_fn = lambda params, batch: LOSS_FN(jax.tree.map(lambda w: 2 * jax.lax.stop_gradient(w) - w, params), batch)
    with pytest.raises(ValueError, match="custom_vjp, stop_gradient"):
        check(optax.chain(crsam(loss_fn), SGD), loss_fn)


def test_it_speaks_as_update_does():
    with pytest.raises(TypeError, match=r"check_setup\(tx, loss_fn, params, batch=...\)"):
        check_setup(sam(LOSS_FN), LOSS_FN, PARAMS)
    with pytest.raises(ValueError, match="tree structure of params"):
        check(sam(LOSS_FN), grads={"first": 0.0})
