"""Losses with known derivatives, a small network, and the family, shared by the tests."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import crsam_jax

# Every member, called with loss_fn and the common keyword options.
MEMBERS: dict[str, Callable[..., Any]] = {
    "sam": crsam_jax.sam,
    "asam": crsam_jax.asam,
    "wsam": crsam_jax.wsam,
    "gsam": crsam_jax.gsam,
    "gradient_norm_penalty": crsam_jax.gradient_norm_penalty,
    "crsam": crsam_jax.crsam,
    "crsam_linear": partial(crsam_jax.crsam, penalty="linear"),
    "crsam_bounded": partial(crsam_jax.crsam, offset=0.0, max_penalty_ratio=0.5),
}
TWO_SIDED = tuple(name for name in MEMBERS if name.startswith("crsam"))
ONE_SIDED = tuple(name for name in MEMBERS if not name.startswith("crsam"))


class Problem(NamedTuple):
    """L(w) = ½ wᵀHw + bᵀw + c + Σ tᵢwᵢ³/6 over the flattened params; t = 0 makes it a quadratic."""

    hessian: np.ndarray
    linear: np.ndarray
    constant: float
    cubic: np.ndarray
    params: Any

    def loss(self, params: Any) -> jax.Array:
        w = ravel_pytree(params)[0]
        return 0.5 * w @ (self.hessian @ w) + self.linear @ w + self.constant + jnp.sum(self.cubic * w**3) / 6

    def hessian_at(self, params: Any) -> np.ndarray:
        return self.hessian + np.diag(self.cubic * flat(params))


def polynomial(cubic: bool, seed: int = 0) -> Problem:
    """A problem over several leaves of different shapes, in the default float dtype of the moment."""
    rng = np.random.default_rng(seed)
    n = 6
    a = rng.normal(size=(n, n))
    params = {
        "kernel": jnp.asarray(rng.normal(size=(2, 2))),
        "bias": jnp.asarray(3 * rng.normal(size=1)),
        "scale": jnp.asarray(rng.normal()),
    }
    return Problem(a @ a.T / n + np.eye(n), rng.normal(size=n), 7.0, cubic * rng.uniform(-0.3, 0.3, size=n), params)


def direction_and_gradient(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    g = flat(jax.grad(problem.loss)(problem.params))
    return g / np.linalg.norm(g), g


def closed_form(problem: Problem, rho: float) -> tuple[Any, ...]:
    """v, g, g⁺, g⁺ − g⁻, g⁺ + g⁻ − 2g, S and D along the gradient, all exact.

    With H = ∇²L(w): g± = g ± ρHv + ½ρ² t v², S = ρ² vᵀHv and D = 2ρ⟨v, g⟩ + ⅓ρ³ Σ tᵢvᵢ³.
    """
    v, g = direction_and_gradient(problem)
    bend = problem.hessian_at(problem.params) @ v
    second = problem.cubic * v**2
    g_plus = g + rho * bend + rho**2 * second / 2
    difference = 2 * rho * bend  # g⁺ − g⁻
    second_gradient = rho**2 * second  # g⁺ + g⁻ − 2g
    s = rho**2 * v @ bend
    d = 2 * rho * v @ g + rho**3 * np.sum(problem.cubic * v**3) / 3
    return v, g, g_plus, difference, second_gradient, s, d


def mlp(seed: int = 0, examples: int = 32, dtype: Any = jnp.float32) -> tuple[Callable[..., jax.Array], Any, Any]:
    """``loss_fn(params, batch)`` of a two-layer network, its params and a batch."""
    rng = np.random.default_rng(seed)
    params = {
        "first": {"w": jnp.asarray(rng.normal(size=(5, 8)) / 2, dtype), "b": jnp.zeros(8, dtype)},
        "second": {"w": jnp.asarray(rng.normal(size=(8, 3)) / 2, dtype), "b": jnp.zeros(3, dtype)},
    }
    batch = jnp.asarray(rng.normal(size=(examples, 5)), dtype), jnp.asarray(rng.integers(0, 3, size=examples))
    return mlp_loss, params, batch


def mlp_loss(params: Any, batch: Any) -> jax.Array:
    x, labels = batch
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    logits = hidden @ params["second"]["w"] + params["second"]["b"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1))


def flat(tree: Any) -> np.ndarray:
    """All leaves as one numpy vector, in float64."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)] or [np.zeros(0)])


def one_step(tx: Any, loss_fn: Callable[..., Any], params: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The gradient that ``tx`` makes of the true gradient, and its diagnostics."""
    grads = jax.grad(loss_fn)(params, **kwargs)
    gradient, state = tx.update(grads, tx.init(params), params, **kwargs)
    return gradient, state.diagnostics


def recording(loss_fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[np.ndarray]]:
    """The same loss, and a list that gets the point of every evaluation; read it after ``jax.effects_barrier()``.

    Under jit the points are in float32: a callback runs in a thread that does not know of ``enable_x64``.
    """
    points: list[np.ndarray] = []

    @wraps(loss_fn)
    def recorded(params: Any, *args: Any, **kwargs: Any) -> Any:
        jax.debug.callback(lambda w: points.append(flat(w)), params)
        return loss_fn(params, *args, **kwargs)

    return recorded, points


def broken_at(loss_fn: Callable[[Any], jax.Array], is_broken: Callable[[Any], jax.Array]) -> Callable[[Any], jax.Array]:
    """The same loss, NaN with its gradient wherever ``is_broken(params)``."""

    def broken(params: Any) -> jax.Array:
        return loss_fn(params) * jnp.where(is_broken(params), jnp.nan, 1.0)

    return broken


def matrix_products(compiled: Any) -> int:
    """How many matrix products a compiled program holds."""
    return sum(" dot(" in line or "__onednn$matmul" in line for line in compiled.as_text().splitlines())
