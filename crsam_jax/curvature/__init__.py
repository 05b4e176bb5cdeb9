"""Measuring the geometry of a loss: gradient norm, Hessian trace and spectrum, sharpness, approximation ratio.

Every measure takes ``loss_fn(params, **kwargs)``, the form that the optimizers take, and ``data``: one batch, which is
a mapping of those keyword arguments, or a whole data set, which is an iterable of batches that can be gone through
several times (a list, :class:`Batches`, an object whose ``__iter__`` starts afresh). Over a data set every
number is that of the mean loss over all examples, whatever the batch sizes, with one batch in memory at a time.

The loss must be a mean over independent examples. So a model with BatchNorm is measured in evaluation mode,
with stored statistics; in training mode the loss of a data set would depend on how it is cut into batches.
"""

from crsam_jax.curvature._batches import Batches
from crsam_jax.curvature.composed import Composed
from crsam_jax.curvature.groups import parameter_groups, plot_by_group
from crsam_jax.curvature.hessian import (
    empirical_fisher_vector_product,
    gauss_newton_vector_product,
    gradient_norm,
    hessian_vector_product,
)
from crsam_jax.curvature.objective import Objective
from crsam_jax.curvature.ratio import ApproximationRatio, approximation_ratio
from crsam_jax.curvature.results import (
    AverageSharpness,
    Eigenpairs,
    Estimate,
    NormalizedTrace,
    Spectrum,
    WorstCaseSharpness,
)
from crsam_jax.curvature.sharpness import average_sharpness, worst_case_sharpness
from crsam_jax.curvature.spectrum import hessian_spectrum, smallest_eigenvalues, top_eigenvalues
from crsam_jax.curvature.trace import hessian_trace, hessian_trace_by_group, normalized_hessian_trace

__all__ = [
    "ApproximationRatio",
    "AverageSharpness",
    "Batches",
    "Composed",
    "Eigenpairs",
    "Estimate",
    "NormalizedTrace",
    "Objective",
    "Spectrum",
    "WorstCaseSharpness",
    "approximation_ratio",
    "average_sharpness",
    "empirical_fisher_vector_product",
    "gauss_newton_vector_product",
    "gradient_norm",
    "hessian_spectrum",
    "hessian_trace",
    "hessian_trace_by_group",
    "hessian_vector_product",
    "normalized_hessian_trace",
    "parameter_groups",
    "plot_by_group",
    "smallest_eigenvalues",
    "top_eigenvalues",
    "worst_case_sharpness",
]
