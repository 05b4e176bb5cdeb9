"""CR-SAM and the sharpness-aware family as optax gradient transformations.

>>> import jax.numpy as jnp, optax
>>> from crsam_jax import crsam
>>> def loss_fn(params, batch):
...   x, y = batch
...   return jnp.mean((x @ params - y) ** 2)
>>> tx = optax.chain(crsam(loss_fn, rho=0.1, alpha=0.1, beta=0.01), optax.sgd(0.1))
"""

import importlib.metadata

from crsam_jax._sharpened import sharpened
from crsam_jax.ascents.adaptive import adaptive_ascent
from crsam_jax.ascents.ascent import Ascent, gradient_ascent, masked_ascent
from crsam_jax.ascents.noisy import dropped_ascent, smoothed_ascent
from crsam_jax.ascents.running import friendly_ascent, momentum_ascent
from crsam_jax.ascents.sparse import SparseState, dynamic_sparse_ascent, largest_fraction, sparse_ascent
from crsam_jax.members.crsam import GradientFn, crsam, crsam_gradient
from crsam_jax.members.gradient_norm import gradient_norm_penalty
from crsam_jax.members.gsam import gsam
from crsam_jax.members.one_evaluation import msam, s2sam
from crsam_jax.members.random_probes import random_probes
from crsam_jax.members.sam import asam, rsam, sam
from crsam_jax.members.shifted import OneEvaluationDiagnostics, OneEvaluationState, eval_params
from crsam_jax.members.wsam import DecoupledWsamState, decoupled_wsam, wsam
from crsam_jax.policies.adaptive import AdaptivePolicyState, adaptive_policy
from crsam_jax.policies.late import LateState, late
from crsam_jax.policies.look import LookState, look
from crsam_jax.policies.periodic import PeriodicState, periodic
from crsam_jax.policies.policy import is_full_step
from crsam_jax.step.convolutions import canonical_convolutions
from crsam_jax.step.diagnostics import (
    AscentOnlyDiagnostics,
    OneSidedDiagnostics,
    RandomProbesDiagnostics,
    TwoSidedDiagnostics,
)
from crsam_jax.step.execution import Execution
from crsam_jax.step.rule import Outcome, Rule, Step
from crsam_jax.step.setup import check_setup
from crsam_jax.step.sides import at_multiples, one_sided, two_sided
from crsam_jax.step.transformation import SharpnessAwareState, sharpness_aware
from crsam_jax.step.types import Evaluation
from crsam_jax.step.vectors import Vector

try:
    __version__ = importlib.metadata.version("crsam_jax")
except importlib.metadata.PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "AdaptivePolicyState",
    "Ascent",
    "AscentOnlyDiagnostics",
    "DecoupledWsamState",
    "Evaluation",
    "Execution",
    "GradientFn",
    "LateState",
    "LookState",
    "OneEvaluationDiagnostics",
    "OneEvaluationState",
    "OneSidedDiagnostics",
    "Outcome",
    "PeriodicState",
    "RandomProbesDiagnostics",
    "Rule",
    "SharpnessAwareState",
    "SparseState",
    "Step",
    "TwoSidedDiagnostics",
    "Vector",
    "adaptive_ascent",
    "adaptive_policy",
    "asam",
    "at_multiples",
    "canonical_convolutions",
    "check_setup",
    "crsam",
    "crsam_gradient",
    "decoupled_wsam",
    "dropped_ascent",
    "dynamic_sparse_ascent",
    "eval_params",
    "friendly_ascent",
    "gradient_ascent",
    "gradient_norm_penalty",
    "gsam",
    "is_full_step",
    "largest_fraction",
    "late",
    "look",
    "masked_ascent",
    "momentum_ascent",
    "msam",
    "one_sided",
    "periodic",
    "random_probes",
    "rsam",
    "s2sam",
    "sam",
    "sharpened",
    "sharpness_aware",
    "smoothed_ascent",
    "sparse_ascent",
    "two_sided",
    "wsam",
]
