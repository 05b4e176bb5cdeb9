"""Mean and standard error of samples, and when they are enough."""

import math
from typing import Any

import numpy as np

from crsam_jax._checks import check_number
from crsam_jax.curvature.results import Estimate

ESTIMATORS = ("rademacher", "gaussian", "xtrace")

# A standard error from fewer probes is too rough to stop on.
_FEWEST_PROBES_TO_STOP = 10


def estimate(samples: Any) -> Estimate:
    """Mean and standard error of independent samples, in float64."""
    values = np.asarray(samples, np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size)), values.size)


def is_precise(so_far: list[Any], relative_standard_error: float | None) -> bool:
    """Whether there are enough samples, and their mean is known to the precision that was asked for."""
    if relative_standard_error is None or len(so_far) < _FEWEST_PROBES_TO_STOP:
        return False
    result = estimate(so_far)
    return result.standard_error <= relative_standard_error * abs(result.mean)


def check_precision(relative_standard_error: float | None) -> None:
    """Checks that it is a number that is not negative, or None.

    Raises:
      TypeError, ValueError: if it is not.
    """
    if relative_standard_error is not None:
        check_number("relative_standard_error", relative_standard_error)
