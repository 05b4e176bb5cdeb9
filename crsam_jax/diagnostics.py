"""What a step saw, beside the gradient: scalars in float32, or float64 if the params are, and int32 counts.

They cost no gradient evaluation. Read one from an optimizer state by ``optax.tree.get(opt_state, "curvature")``.
Before the first step, and where nothing was perturbed, a measure along v is 0. A field that ends in ``_steps`` counts.
"""

from typing import NamedTuple

import jax


class OneSidedDiagnostics(NamedTuple):
    """What a step saw at w and w + ρv.

    Attributes:
      loss: L(w). Equals the caller's own loss if the gradient passed in belongs to the same loss.
      loss_plus: L⁺ = L(w + ρv).
      grad_norm: ‖g‖ over the whole tree.
      cosine: cosine of the angle between g and the gradient returned.
      curvature: ⟨v, g⁺ − g⟩/(ρ‖v‖²) ≈ vᵀHv/‖v‖².
      guarded_steps: how many steps so far fell back on g.
      mismatched_steps: in how many steps so far g or L did not belong to the loss at the perturbed point. If it is
        most steps, the set-up is wrong: see :func:`crsam_jax.check_setup`.
    """

    loss: jax.Array
    loss_plus: jax.Array
    grad_norm: jax.Array
    cosine: jax.Array
    curvature: jax.Array
    guarded_steps: jax.Array
    mismatched_steps: jax.Array


class AscentOnlyDiagnostics(NamedTuple):
    """What a step saw whose incoming gradient gives v alone; it may be the gradient of a part of the batch.

    Attributes:
      loss_plus: L⁺ = L(w + ρv).
      grad_norm: ‖g‖ over the whole tree, of the gradient passed in.
      slope: ⟨v, g⁺⟩/‖v‖, the slope at the perturbed point. Along the gradient, slope/grad_norm says how much of the
        part's direction the whole batch shares.
      guarded_steps: how many steps so far fell back on g.
    """

    loss_plus: jax.Array
    grad_norm: jax.Array
    slope: jax.Array
    guarded_steps: jax.Array


class TwoSidedDiagnostics(NamedTuple):
    """What a step saw at w, w + ρv and w − ρv.

    Attributes:
      loss: L(w). Equals the caller's own loss if the gradient passed in belongs to the same loss.
      loss_plus: L⁺ = L(w + ρv).
      loss_minus: L⁻ = L(w − ρv).
      grad_norm: ‖g‖ over the whole tree.
      cosine: cosine of the angle between g and the gradient returned.
      slope: D/(2ρ‖v‖) ≈ vᵀ∇L/‖v‖, which is ‖g‖ along the gradient. Far from ``grad_norm`` it betrays a gradient
        of another loss: other data, another dropout mask, scaled or clipped.
      curvature: S/(ρ²‖v‖²) ≈ vᵀHv/‖v‖².
      normalized_curvature: curvature/‖g‖, the paper's C(w) along v.
      penalty_ratio: ‖penalty's gradient‖/‖g⁺‖ before the bound.
      guarded_steps: how many steps so far left a term out, or fell back on g⁺ or g.
      bounded_steps: in how many steps so far the penalty was scaled down to its bound.
      mismatched_steps: in how many steps so far g or L did not belong to the loss at the perturbed points. If it is
        most steps, the set-up is wrong: see :func:`crsam_jax.check_setup`.
    """

    loss: jax.Array
    loss_plus: jax.Array
    loss_minus: jax.Array
    grad_norm: jax.Array
    cosine: jax.Array
    slope: jax.Array
    curvature: jax.Array
    normalized_curvature: jax.Array
    penalty_ratio: jax.Array
    guarded_steps: jax.Array
    bounded_steps: jax.Array
    mismatched_steps: jax.Array


class RandomProbesDiagnostics(NamedTuple):
    """What a step saw at w, w + ρv and k random pairs w ± r uᵢ.

    Attributes:
      loss: L(w). Equals the caller's own loss if the gradient passed in belongs to the same loss.
      loss_plus: L⁺ = L(w + ρv).
      grad_norm: ‖g‖ over the whole tree.
      cosine: cosine of the angle between g and the gradient returned.
      curvature: ⟨v, g⁺ − g⟩/(ρ‖v‖²) ≈ vᵀHv/‖v‖².
      trace: n · mean(Sᵢ)/r² ≈ Tr(∇²L) over the n perturbed parameters. One step's estimate is noisy: average it.
      normalized_trace: trace/‖g‖, the paper's C(w).
      penalty_ratio: ‖penalty's gradient‖/‖g⁺‖ before the bound.
      guarded_steps: how many steps so far left a term out, or fell back on g⁺ or g.
      bounded_steps: in how many steps so far the penalty was scaled down to its bound.
      mismatched_steps: in how many steps so far g or L did not belong to the loss at the perturbed point. If it is
        most steps, the set-up is wrong: see :func:`crsam_jax.check_setup`.
    """

    loss: jax.Array
    loss_plus: jax.Array
    grad_norm: jax.Array
    cosine: jax.Array
    curvature: jax.Array
    trace: jax.Array
    normalized_trace: jax.Array
    penalty_ratio: jax.Array
    guarded_steps: jax.Array
    bounded_steps: jax.Array
    mismatched_steps: jax.Array


Diagnostics = OneSidedDiagnostics | AscentOnlyDiagnostics | TwoSidedDiagnostics | RandomProbesDiagnostics
