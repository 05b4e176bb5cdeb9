"""CR-SAM and the sharpness-aware family as optax gradient transformations.

>>> import jax.numpy as jnp, optax
>>> from crsam_jax import crsam
>>> def loss_fn(params, batch):
...   x, y = batch
...   return jnp.mean((x @ params - y) ** 2)
>>> tx = optax.chain(crsam(loss_fn, rho=0.1, alpha=0.1, beta=0.01), optax.sgd(0.1))
"""

import importlib.metadata

from crsam_jax._crsam import crsam, crsam_gradient
from crsam_jax.adaptive_policy import AdaptivePolicyState, adaptive_policy
from crsam_jax.alias import asam, gradient_norm_penalty, gsam, rsam, sam, wsam
from crsam_jax.ascent import Ascent, adaptive_ascent, gradient_ascent, masked_ascent
from crsam_jax.decoupled import DecoupledWsamState, decoupled_wsam
from crsam_jax.diagnostics import OneSidedDiagnostics, RandomProbesDiagnostics, TwoSidedDiagnostics
from crsam_jax.look import LookState, look
from crsam_jax.noisy_ascent import dropped_ascent, smoothed_ascent
from crsam_jax.penalties import Penalty, Step, one_sided_penalty
from crsam_jax.policies import PeriodicState, is_full_step, periodic
from crsam_jax.probes import Evaluation
from crsam_jax.random_probes import random_probes
from crsam_jax.running_ascent import friendly_ascent, momentum_ascent
from crsam_jax.sparse_ascent import SparseState, dynamic_sparse_ascent, largest_fraction, sparse_ascent
from crsam_jax.transform import SharpnessAwareState, sharpness_aware

try:
    __version__ = importlib.metadata.version("crsam_jax")
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "AdaptivePolicyState",
    "Ascent",
    "DecoupledWsamState",
    "Evaluation",
    "LookState",
    "OneSidedDiagnostics",
    "Penalty",
    "PeriodicState",
    "RandomProbesDiagnostics",
    "SharpnessAwareState",
    "SparseState",
    "Step",
    "TwoSidedDiagnostics",
    "adaptive_ascent",
    "adaptive_policy",
    "asam",
    "crsam",
    "crsam_gradient",
    "decoupled_wsam",
    "dropped_ascent",
    "dynamic_sparse_ascent",
    "friendly_ascent",
    "gradient_ascent",
    "gradient_norm_penalty",
    "gsam",
    "is_full_step",
    "largest_fraction",
    "look",
    "masked_ascent",
    "momentum_ascent",
    "one_sided_penalty",
    "periodic",
    "random_probes",
    "rsam",
    "sam",
    "sharpness_aware",
    "smoothed_ascent",
    "sparse_ascent",
    "wsam",
]
