"""Random probes for CR-SAM's penalty: eq. 7 of the paper before it settles on the gradient's direction."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crsam_jax import _trees as trees
from crsam_jax._checks import check_number, check_seed
from crsam_jax._parallel import Displacement
from crsam_jax._penalty import checked_numbers, log_weight, with_penalty
from crsam_jax._trees import Params
from crsam_jax.ascents import Mask, masked, normal_like, perturbed_part, step_key
from crsam_jax.diagnostics import RandomProbesDiagnostics
from crsam_jax.engine import Outcome, Rule, Scalar, Step, one_sided_report, penalty_ratio, second_difference


class RandomProbes(NamedTuple):
    """Where the penalty looks: k pairs w ± r uᵢ; made by :func:`random_probes`."""

    k: int
    radius: Scalar
    seed: int


def random_probes(k: int = 1, radius: Scalar = 1.0, seed: int = 0) -> RandomProbes:
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
      radius: r > 0, distance of the probes in parameter space, a number or a traced scalar.
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
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}.")
    check_number("radius", radius)
    if not isinstance(radius, jax.core.Tracer) and radius == 0:
        raise ValueError("radius must be positive, got 0.")
    check_seed(seed)
    return RandomProbes(k, radius, seed)


def random_curvature_penalty(
    probes: RandomProbes,
    alpha: optax.ScalarOrSchedule,
    beta: optax.ScalarOrSchedule,
    offset: optax.ScalarOrSchedule,
    max_penalty_ratio: optax.ScalarOrSchedule | None,
    mask: Mask | None,
) -> Rule:
    """The rule of :func:`random_probes`; directions stay inside the mask."""
    k, radius, seed = probes

    def points(params: Params, plus: Displacement, count: jax.Array) -> list[Displacement]:
        distance = jnp.asarray(radius, plus.factors[-1].dtype)
        directions = _directions(params, perturbed_part(mask, params), k, step_key(seed, count))
        return [Displacement(u, (sign * distance,)) for u in directions for sign in (1, -1)]

    def combine(
        step: Step,
        alpha: jax.Array,
        beta: jax.Array,
        offset: jax.Array,
        max_penalty_ratio: jax.Array | None = None,
    ) -> Outcome:
        pairs = _pairs(step.further_losses)
        noises = [step.loss_noise(plus, 2 * step.loss, minus) for plus, minus in pairs]
        seconds = _sum_of_second_differences(step)
        squares = _sum([(plus - minus) ** 2 for plus, minus in pairs])
        a, a_is_off = log_weight(alpha, offset * k + seconds, _sum(noises))
        b, b_is_off = log_weight(beta, offset * k + squares, _sum([noise**2 for noise in noises]))
        return with_penalty(step, (0.0, 0.0, a, b), jnp.isfinite(seconds), a_is_off | b_is_off, max_penalty_ratio)

    def report(step: Step, outcome: Outcome) -> dict[str, jax.Array]:
        size = _perturbed_size(step.params, perturbed_part(mask, step.params))
        trace = step.measured(size * _sum_of_second_differences(step) / (k * radius**2))
        return {
            **one_sided_report(step, outcome),
            "trace": trace,
            "normalized_trace": trees.safe_ratio(trace, step.grad_norm),
            "penalty_ratio": penalty_ratio(step, outcome),
        }

    numbers = checked_numbers(alpha, beta, offset, max_penalty_ratio)
    return Rule(combine, report, RandomProbesDiagnostics, numbers, points, _summed_pairs)


def _directions(params: Params, is_in: Any, k: int, key: jax.Array) -> list[Params]:
    """Unit vectors inside the mask. An ascent with the same seed draws from the key; each pair from one of its own."""
    noises = [normal_like(jax.random.fold_in(key, i), params) for i in range(k)]
    return [trees.unit(masked(noise, is_in)) for noise in noises]


def _perturbed_size(params: Params, is_in: Any) -> int:
    sizes = jax.tree.map(lambda leaf, is_in: math.prod(jnp.shape(leaf)) if is_in else 0, params, is_in)
    return sum(jax.tree.leaves(sizes))


def _summed_pairs(losses: Sequence[jax.Array], g: jax.Array, plus: jax.Array, *further: jax.Array) -> list[jax.Array]:
    """g, d, Σ (g⁺ᵢ + g⁻ᵢ − 2g) and Σ Dᵢ (g⁺ᵢ − g⁻ᵢ): two sums over all pairs, whatever their number."""
    pairs = _pairs(further)
    firsts = [(above - below).astype(g.dtype) for above, below in _pairs(losses[2:])]
    second = _sum([(a - g) + (b - g) for a, b in pairs])
    first = _sum([d * (a - b) for d, (a, b) in zip(firsts, pairs, strict=True)])
    return [g, plus - g, second, first]


def _sum_of_second_differences(step: Step) -> jax.Array:
    return _sum([second_difference(step.loss, plus, minus) for plus, minus in _pairs(step.further_losses)])


def _pairs(values: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)
