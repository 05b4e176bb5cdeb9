"""CR-SAM and the sharpness-aware family as optax gradient transformations.

>>> import jax.numpy as jnp, optax
>>> from crsam_jax import crsam
>>> def loss_fn(params, batch):
...   x, y = batch
...   return jnp.mean((x @ params - y) ** 2)
>>> tx = optax.chain(crsam(loss_fn, rho=0.1, alpha=0.1, beta=0.01), optax.sgd(0.1))
"""

import importlib
import importlib.metadata
import warnings
from typing import Any

from crsam_jax import ascents, diagnostics, engine, policies
from crsam_jax._check_setup import check_setup
from crsam_jax._convolutions import canonical_convolutions
from crsam_jax._crsam import GradientFn, crsam, crsam_gradient
from crsam_jax._one_sided import DecoupledWsamState, asam, decoupled_wsam, gradient_norm_penalty, gsam, rsam, sam, wsam
from crsam_jax._parallel import Execution
from crsam_jax._random_probes import random_probes
from crsam_jax._sharpened import sharpened
from crsam_jax._variants import functional_sam, le_sam, multi_step_sam, rwp, stable_sam
from crsam_jax.policies import adaptive_policy, is_full_step, late, look, periodic
from crsam_jax.shifted import eval_params, msam, s2sam

try:
    __version__ = importlib.metadata.version("crsam_jax")
except importlib.metadata.PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "DecoupledWsamState",
    "Execution",
    "GradientFn",
    "adaptive_policy",
    "asam",
    "ascents",
    "canonical_convolutions",
    "check_setup",
    "crsam",
    "crsam_gradient",
    "decoupled_wsam",
    "diagnostics",
    "engine",
    "eval_params",
    "functional_sam",
    "gradient_norm_penalty",
    "gsam",
    "is_full_step",
    "late",
    "le_sam",
    "look",
    "msam",
    "multi_step_sam",
    "periodic",
    "policies",
    "random_probes",
    "rsam",
    "rwp",
    "s2sam",
    "sam",
    "sharpened",
    "stable_sam",
    "wsam",
]

_MOVED = {
    "ascents": [
        "Ascent", "SparseState", "adaptive_ascent", "dropped_ascent", "dynamic_sparse_ascent", "friendly_ascent",
        "gradient_ascent", "largest_fraction", "masked_ascent", "momentum_ascent", "smoothed_ascent", "sparse_ascent",
    ],
    "diagnostics": [
        "AscentOnlyDiagnostics", "OneSidedDiagnostics", "RandomProbesDiagnostics", "TwoSidedDiagnostics",
    ],
    "engine": [
        "Outcome", "Rule", "SharpnessAwareState", "Step", "at_multiples", "one_sided", "sharpness_aware", "two_sided",
    ],
    "policies": ["AdaptivePolicyState", "LateState", "LookState", "PeriodicState"],
    "shifted": ["OneEvaluationDiagnostics", "OneEvaluationState"],
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names that have moved to a submodule; they still work here, with a warning."""
    for module, names in _MOVED.items():
        if name in names:
            message = f"crsam_jax.{name} has moved: write crsam_jax.{module}.{name}."
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return getattr(importlib.import_module(f"crsam_jax.{module}"), name)
    raise AttributeError(f"module 'crsam_jax' has no attribute {name!r}")
