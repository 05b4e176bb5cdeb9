"""What the measures return."""

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


class Estimate(NamedTuple):
    """A Monte-Carlo estimate.

    Attributes:
      mean: the estimate, a float.
      standard_error: the standard error of the mean, a float: the root of an unbiased estimate of its variance, which
        for independent samples is the sample variance over num_probes. With few probes it is itself uncertain, by
        about 1/√(2 num_probes): an interval for the truth is mean ± q · standard_error with q of Student's distribution
        of num_probes − 1 degrees of freedom.
      num_probes: how many samples it rests on.
    """

    mean: float
    standard_error: float
    num_probes: int


class NormalizedTrace(NamedTuple):
    """The normalized trace C(w) = Tr ∇²L(w)/‖∇L(w)‖.

    Attributes:
      mean: C(w), a float; infinite or NaN where the gradient is zero.
      standard_error: the trace's standard error divided by ‖∇L‖, which is exact.
      trace: the trace with its own standard error.
      gradient_norm: ‖∇L(w)‖.
    """

    mean: float
    standard_error: float
    trace: Estimate
    gradient_norm: float


class Eigenpairs(NamedTuple):
    """The k largest eigenvalues that were found.

    Attributes:
      values: λ₁ ≥ ... ≥ λ_k, [k], float64.
      residuals: ‖∇²L v_i − λ_i v_i‖, [k], float64: an eigenvalue lies within this distance of λ_i.
      vectors: the unit eigenvectors v_i, a list of k pytrees like params.
    """

    values: Array
    residuals: Array
    vectors: list[Any]


class Spectrum(NamedTuple):
    """The density of eigenvalues, φ(t) = (1/n) Σ_i N(t; λ_i, width²), and the quadrature it comes from.

    Attributes:
      grid: the points t, [g], float64.
      density: φ(t), the mean over probes, [g]; it integrates to 1 over the whole line.
      standard_error: the standard error of the density, over probes, [g]; see :func:`hessian_spectrum`.
      nodes: Ritz values, [num_probes, num_steps].
      weights: their weights, [num_probes, num_steps], rows adding up to 1: Σ_j weights f(nodes) estimates
        (1/n) Tr f(∇²L) for each probe. Steps that a probe did not need have weight 0.
    """

    grid: Array
    density: Array
    standard_error: Array
    nodes: Array
    weights: Array


class WorstCaseSharpness(NamedTuple):
    """The largest rise of the loss that gradient ascent found in the ball.

    Attributes:
      value: max of ``losses`` − L(w) ≥ 0, a float; a lower bound of the true maximum, as ascent is local.
      losses: the loss along the path, from L(w) at the start to the last point, [num_steps + 1], float64.
    """

    value: float
    losses: Array


class AverageSharpness(NamedTuple):
    """The mean rise of the loss under Gaussian noise.

    Attributes:
      mean: a float; may be negative.
      standard_error: the standard error of the mean over the draws of the noise.
      num_probes: how many draws.
      loss: L(w).
    """

    mean: float
    standard_error: float
    num_probes: int
    loss: float
