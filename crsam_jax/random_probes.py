"""Random probes for CR-SAM's penalty: eq. 7 of the paper before it settles on the gradient's direction."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax import _tree
from crsam_jax._checks import ScalarOrSchedule, check_number, check_seed
from crsam_jax.ascent import Mask, broadcast_mask
from crsam_jax.curvature_penalty import (
    add_term,
    checked_hyperparameters,
    log_weight,
    loss_noise,
    second_difference,
)
from crsam_jax.diagnostics import RandomProbesDiagnostics
from crsam_jax.noisy_ascent import normal_like, step_key
from crsam_jax.penalties import Penalty, Step, one_sided_curvature
from crsam_jax.probes import perturb


class RandomProbes(NamedTuple):
    """Where the penalty looks: k pairs w ± r uᵢ; made by :func:`random_probes`."""

    k: int
    radius: float
    seed: int


def random_probes(k: int = 1, radius: float = 1.0, seed: int = 0) -> RandomProbes:
    """Probes for the penalty of :func:`crsam_jax.crsam` along random unit directions instead of the gradient's.

    In eq. 7 the expectation runs over v ~ N(0, I), whose length is about √n for n parameters. Here uᵢ is
    uniform on the unit sphere and the radius says how far the probes are. Then E S = r² Tr(∇²L)/n + O(r⁴): with
    a small radius S drowns in the rounding of the losses, and with δ = 0 the penalty switches itself off
    (``guarded_steps``); with n parameters, r = √n/100 or so is a start. The logarithms act on averages, since a
    single S or D may be negative: the penalty is α log(δ + mean S) + (β/2) log(δ + mean D²), because E D = 0 and
    D² estimates ‖∇L‖², and its gradient, with uᵢ held constant,

        α Σ(g⁺ᵢ + g⁻ᵢ − 2g)/(δk + ΣSᵢ) + β ΣDᵢ(g⁺ᵢ − g⁻ᵢ)/(δk + ΣDᵢ²).

    SAM's term g⁺ stays at w + ρv. A step costs 2 + 2k evaluations. Directions differ from step to step, and depend on
    the seed and the step alone.

    Args:
      k: number of pairs, an integer ≥ 1.
      radius: r > 0, distance of the probes in parameter space.
      seed: an integer.

    Returns:
      The value for ``crsam``'s argument ``probes``.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: jnp.sum(w**2)  # the Hessian is 2 I
      >>> tx = crsam_jax.crsam(loss_fn, probes=crsam_jax.random_probes(k=2, radius=0.5))
      >>> w = jnp.ones(3)
      >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(state.diagnostics.trace)
      6.0

    References:
      Wu et al., "CR-SAM", AAAI 2024, eq. 7 and theorem 1; the form of the averages is this library's.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}.")
    check_number("radius", radius)
    if radius == 0:
        raise ValueError("radius must be positive, got 0.")
    check_seed(seed)
    return RandomProbes(k, radius, seed)


def random_curvature_penalty(
    probes: RandomProbes,
    alpha: ScalarOrSchedule,
    beta: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    max_penalty_ratio: ScalarOrSchedule | None,
    mask: Mask | None,
) -> Penalty:
    """The penalty of :func:`random_probes`; directions stay inside the mask."""
    hyperparams = checked_hyperparameters(alpha, beta, offset, max_penalty_ratio)
    k, radius, seed = probes

    def directions(params: Any, count: jax.Array) -> list[Any]:
        which = broadcast_mask("mask", True if mask is None else mask, params)
        key = step_key(seed, count)  # an ascent with the same seed draws from it; the pairs draw from keys of their own
        noises = [normal_like(jax.random.fold_in(key, i), params) for i in range(k)]
        return [
            _tree.unit(jax.tree.map(lambda leaf, is_in: leaf if is_in else jnp.zeros_like(leaf), noise, which))
            for noise in noises
        ]

    def points(params: Any, direction: Any, ascent_radius: jax.Array, count: jax.Array) -> list[Any]:
        del direction
        distance = jnp.asarray(radius, ascent_radius.dtype)
        return [perturb(params, u, sign * distance) for u in directions(params, count) for sign in (1, -1)]

    def combine(
        step: Step,
        alpha: jax.Array,
        beta: jax.Array,
        offset: jax.Array,
        max_penalty_ratio: jax.Array | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        pairs = list(zip(step.others[::2], step.others[1::2], strict=True))
        loss = _tree.widen(step.loss)
        losses = [_tree.widen((plus.loss, minus.loss)) for plus, minus in pairs]
        seconds = [second_difference(loss, a, b) for a, b in losses]
        firsts = [a - b for a, b in losses]
        noises = [loss_noise(step.loss.dtype, loss, a, b) for a, b in losses]
        second_weight, second_off = log_weight(alpha, offset * k + sum(seconds), sum(noises, jnp.zeros(())))
        squares, square_noise = sum(d**2 for d in firsts), sum((e**2 for e in noises), jnp.zeros(()))
        first_weight, first_off = log_weight(beta, offset * k + squares, square_noise)

        def leaf_term(g: jax.Array, *probed: jax.Array) -> jax.Array:
            both = list(zip(probed[::2], probed[1::2], strict=True))
            second = sum((a - g) + (b - g) for a, b in both)
            first = sum(d * (a - b) for d, (a, b) in zip(firsts, both, strict=True))
            return second_weight * second + first_weight * first

        term = _tree.wide_map(leaf_term, step.grads, *(probe.grads for probe in step.others))
        is_valid = jnp.isfinite(sum(seconds)) & _tree.all_finite([probe.grads for probe in step.others])
        gradient, report = add_term(step.plus.grads, term, is_valid, max_penalty_ratio)
        trace = _perturbed_size(step.grads) * jnp.asarray(sum(seconds)) / (k * radius**2)
        return gradient, {
            "curvature": one_sided_curvature(step),
            "trace": trace,
            "normalized_trace": _tree.safe_ratio(trace, _tree.norm(step.grads)),
            **report,
            "guarded_steps": report["guarded_steps"] | second_off | first_off,
        }

    def _perturbed_size(params: Any) -> int:
        which = broadcast_mask("mask", True if mask is None else mask, params)
        sizes = jax.tree.map(lambda leaf, is_in: math.prod(jnp.shape(leaf)) if is_in else 0, params, which)
        return sum(jax.tree.leaves(sizes))

    return Penalty(hyperparams, combine, points, RandomProbesDiagnostics)
