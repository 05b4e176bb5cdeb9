"""Those who migrate get the same numbers as from optax.contrib.sam and from the step-by-step classes of PyTorch.

The classes are written out in numpy here, from what they do: a forward and backward pass, ``first_step``, another pass,
``second_step``. Their base optimizer is SGD as PyTorch has it: weight decay added to the gradient, then momentum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import asam, crsam, sam
from tests.core.problems import flat, mlp

pytestmark = pytest.mark.usefixtures("x64")

RATE, MOMENTUM, DECAY, RHO, STEPS = 0.1, 0.9, 1e-2, 0.2, 4


def problem():
    return mlp(examples=16, dtype=jnp.float64)


def train(tx, loss_fn, params, batch):
    """What the user of this library writes."""
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss, batch=batch)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    return flat(params)


def base():
    """PyTorch's SGD(lr, momentum, weight_decay)."""
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))


def gradients_of(loss_fn, params, batch):
    """The oracle: from a list of numpy arrays, one for each parameter, to the list of gradients."""
    structure = jax.tree.structure(params)
    grad = jax.jit(jax.grad(loss_fn))
    return lambda arrays: [np.asarray(g) for g in jax.tree.leaves(grad(jax.tree.unflatten(structure, arrays), batch))]


class TorchSGD:
    """torch.optim.SGD over numpy arrays, changed in place."""

    def __init__(self, params):
        self.params, self.buffers = params, [np.zeros_like(p) for p in params]

    def step(self, grads):
        for p, buffer, g in zip(self.params, self.buffers, grads, strict=True):
            buffer[...] = MOMENTUM * buffer + g + DECAY * p
            p -= RATE * buffer


class TorchSAM:
    """The two-step class: weights move up and back in place, and the base optimizer steps in between."""

    def __init__(self, params, rho, adaptive):
        self.params, self.rho, self.adaptive, self.base = params, rho, adaptive, TorchSGD(params)

    def first_step(self, grads):
        scales = [np.abs(p) if self.adaptive else np.ones_like(p) for p in self.params]
        norm = np.linalg.norm([np.linalg.norm(s * g) for s, g in zip(scales, grads, strict=True)])
        self.old = [p.copy() for p in self.params]
        for p, s, g in zip(self.params, scales, grads, strict=True):
            p += s**2 * g * (self.rho / (norm + 1e-12))

    def second_step(self, grads):
        for p, old in zip(self.params, self.old, strict=True):
            p[...] = old
        self.base.step(grads)


class TorchCRSAM(TorchSAM):
    """The three-step class of CR-SAM's released code: up, down, back; the penalty is linear."""

    def __init__(self, params, rho, alpha, beta):
        super().__init__(params, rho, adaptive=False)
        self.alpha, self.beta = alpha, beta

    def first_step(self, grads):
        super().first_step(grads)
        self.clean = grads

    def second_step(self, grads):
        self.plus = grads
        for p, old in zip(self.params, self.old, strict=True):
            p[...] = 2 * old - p

    def third_step(self, grads):
        combined = [
            plus + self.alpha * (plus + minus - 2 * clean) + self.beta * (plus - minus)
            for clean, plus, minus in zip(self.clean, self.plus, grads, strict=True)
        ]
        super().second_step(combined)


def as_numpy(params):
    return [np.array(leaf) for leaf in jax.tree.leaves(params)]


def joined(arrays):
    return np.concatenate([array.ravel() for array in arrays])


def test_optax_contrib_sam():
    loss_fn, params, batch = problem()
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(base(), ascent, sync_period=2, opaque_mode=True)
    grad_fn = jax.grad(lambda params, _: loss_fn(params, batch))
    w, opt_state = params, theirs.init(params)
    for _ in range(STEPS):
        updates, opt_state = theirs.update(grad_fn(w, 0), opt_state, w, grad_fn=grad_fn)
        w = optax.apply_updates(w, updates)
    ours = train(optax.chain(sam(loss_fn, rho=RHO), base()), loss_fn, params, batch)
    np.testing.assert_allclose(ours, flat(w), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_two_step_class(adaptive):
    loss_fn, params, batch = problem()
    gradients = gradients_of(loss_fn, params, batch)
    arrays = as_numpy(params)
    optimizer = TorchSAM(arrays, RHO, adaptive)
    for _ in range(STEPS):
        optimizer.first_step(gradients(arrays))
        optimizer.second_step(gradients(arrays))
    method = asam(loss_fn, rho=RHO, eta=0.0) if adaptive else sam(loss_fn, rho=RHO)
    ours = train(optax.chain(method, base()), loss_fn, params, batch)
    np.testing.assert_allclose(ours, joined(arrays), rtol=1e-10, atol=1e-11)  # their norm has 1e-12 added


def test_the_three_step_class_of_crsam():
    loss_fn, params, batch = problem()
    gradients = gradients_of(loss_fn, params, batch)
    arrays = as_numpy(params)
    optimizer = TorchCRSAM(arrays, RHO, alpha=0.5, beta=0.1)
    for _ in range(STEPS):
        optimizer.first_step(gradients(arrays))
        optimizer.second_step(gradients(arrays))
        optimizer.third_step(gradients(arrays))
    method = crsam(loss_fn, rho=RHO, alpha=0.5, beta=0.1, penalty="linear")
    ours = train(optax.chain(method, base()), loss_fn, params, batch)
    np.testing.assert_allclose(ours, joined(arrays), rtol=1e-10, atol=1e-11)


def test_the_default_penalty_is_another_one():
    """So that the tests above would fail if the form did not matter."""
    loss_fn, params, batch = problem()
    forms = [
        train(optax.chain(crsam(loss_fn, RHO, 0.5, 0.1, penalty=form), base()), loss_fn, params, batch)
        for form in ("linear", "log")
    ]
    assert np.abs(forms[0] - forms[1]).max() > 1e-4
