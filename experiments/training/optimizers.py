"""A recipe's optimizer: the sharpness-aware gradient of its method, then weight decay, momentum and step size.

SAM, ASAM, CR-SAM, MSAM and S²-SAM have settings of their own in a recipe. The one-sided relatives take SAM's radius,
the variants of CR-SAM take CR-SAM's settings, and what is left is at the defaults of their papers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

import crsam_jax as cj
from experiments.settings.recipes import Recipe
from experiments.settings.suggestions import unknown

LossFn = Callable[..., Any]
Transform: TypeAlias = optax.GradientTransformation
Policy = Callable[[Transform], Transform]


class Method(NamedTuple):
    """How to build a method, and what it costs. It is a stage before the base optimizer, or wraps it."""

    label: str
    """Its name in tables and plots."""
    family: Literal["base", "sam", "crsam"]
    """Whose settings it takes, where it has none of its own."""
    evaluations: float
    """Of the loss's gradient on a batch in a full step."""
    tunes: tuple[str, ...]
    """What a search looks for, beside the learning rate."""
    stage: Callable[[LossFn, Recipe], Transform] | None = None
    around: Callable[[LossFn, Recipe, Transform, optax.Schedule], Transform] | None = None
    """From the loss, the recipe, the base optimizer and its schedule to the whole."""
    is_late: bool = False
    """Whether the base optimizer is alone until the last part of training."""
    is_shifted: bool = False
    """Whether the params in training are perturbed ones; see ``crsam_jax.eval_params``."""
    part: int = 1
    """The ascent, and the logged loss, use every ``part``-th example of a batch."""


_always: Policy = lambda tx: tx
_every_2, _look_5 = partial(cj.periodic, k=2), partial(cj.look, k=5)


def _sam(
    label: str, evaluations: float = 2, make: Callable[..., Transform] = cj.sam, policy: Policy = _always, **kwargs: Any
) -> Method:
    """A one-sided method at SAM's radius."""
    stage = lambda loss_fn, recipe: policy(make(loss_fn, recipe.sam.rho, has_aux=True, **kwargs))
    return Method(label, "sam", evaluations, ("sam.rho",), stage)


def _crsam(label: str, evaluations: float = 3, policy: Policy = _always, **changes: Any) -> Method:
    """CR-SAM, with some of its settings changed."""

    def stage(loss_fn: LossFn, recipe: Recipe) -> Transform:
        options = vars(recipe.crsam) | changes
        execution = cj.Execution(options.pop("strategy"))
        return policy(cj.crsam(loss_fn, execution=execution, has_aux=True, **options))

    return Method(label, "crsam", evaluations, ("crsam.rho", "crsam.alpha", "crsam.beta"), stage)


def _of_normalization(params: Any) -> Any:
    """Which parameters normalize: those that have it in their path, as in ``blocks/0/norm1/scale``."""
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" in jax.tree_util.keystr(path), params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError("sam-on perturbs normalization layers, and no parameter of this network has norm in its name.")
    return mask


METHODS: dict[str, Method] = {
    "base": Method("base", "base", 1, (), around=lambda f, r, base, schedule: base),
    "sam": _sam("SAM"),
    "asam": Method("ASAM", "sam", 2, ("asam.rho",), lambda f, r: cj.asam(f, **vars(r.asam), has_aux=True)),
    "rsam": _sam("R-SAM", 3, cj.rsam),
    "wsam": _sam("WSAM, coupled", 2, cj.wsam),
    "decoupled-wsam": Method(
        "WSAM, decoupled",
        "sam",
        2,
        ("sam.rho",),
        around=lambda f, r, base, schedule: cj.decoupled_wsam(f, base, schedule, r.sam.rho, has_aux=True),
    ),
    "gsam": _sam("GSAM", 2, cj.gsam),
    "gradient-norm": _sam("gradient-norm penalty", 2, cj.gradient_norm_penalty),
    "esam": _sam("ESAM's perturbation", ascent=cj.ascents.dropped_ascent()),
    "ssam": _sam("SSAM, dynamic", ascent=cj.ascents.dynamic_sparse_ascent()),
    "momentum-sam": _sam("Momentum-SAM's direction", ascent=cj.ascents.momentum_ascent()),
    "friendly-sam": _sam("Friendly SAM", ascent=cj.ascents.friendly_ascent()),
    "stable-sam": _sam("StableSAM", 2, cj.stable_sam),
    "le-sam": _sam("LE-SAM, σ for ρ", 2, cj.le_sam),
    "multi-step-sam": _sam("SAM, 2 ascent steps", 3, cj.multi_step_sam),
    "rwp": _sam("m-RWP, σ for ρ", 2, cj.rwp),
    "vasso": _sam("VaSSO", ascent=cj.ascents.variance_suppressed_ascent()),
    "preconditioned-sam": _sam("SAM along Adam's direction", ascent=cj.ascents.preconditioned_ascent()),
    "sam-every-2": _sam("SAM every 2nd step", policy=_every_2),
    "look-sam": _sam("LookSAM, k = 5", policy=_look_5),
    "ae-sam": _sam("AE-SAM's policy", policy=cj.adaptive_policy),
    "sam-quarter": _sam("SAM, ascent on a quarter", 1.25, ascent_only=True)._replace(part=4),
    "sam-on": _sam("SAM-ON, normalization alone", mask=_of_normalization),
    "sam-late": _sam("late SAM")._replace(is_late=True),
    "msam": Method(
        "MSAM",
        "sam",
        1,
        ("msam.rho",),
        is_shifted=True,
        around=lambda f, r, base, schedule: cj.msam(base, r.msam.rho, r.momentum),
    ),
    "s2sam": Method(
        "S²-SAM",
        "sam",
        1,
        ("s2sam.rho",),
        is_shifted=True,
        around=lambda f, r, base, schedule: cj.s2sam(base, r.s2sam.rho),
    ),
    "crsam": _crsam("CR-SAM"),
    "crsam-late": _crsam("late CR-SAM")._replace(is_late=True),
    "crsam-linear": _crsam("CR-SAM, linear", penalty="linear"),
    "crsam-eq7": _crsam("CR-SAM, eq. 7, κ = 0.5", offset=0.0, max_penalty_ratio=0.5),
    "crsam-gradients": _crsam("CR-SAM, gradient differences", differences="gradients"),
    "crsam-random": _crsam("CR-SAM, 1 random pair", 4, probes=cj.random_probes()),
    "crsam-adaptive": _crsam("CR-SAM along ASAM's direction", ascent=cj.ascents.adaptive_ascent()),
    "crsam-every-2": _crsam("CR-SAM every 2nd step", policy=_every_2),
    "crsam-look": _crsam("CR-SAM + LookSAM, k = 5", policy=_look_5),
    "crsam-ae": _crsam("CR-SAM + AE-SAM", policy=cj.adaptive_policy),
}


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names; if there is none, a ValueError has the close ones."""
    if recipe.method not in METHODS:
        raise unknown("method", recipe.method, METHODS)
    method = METHODS[recipe.method]
    if recipe.method == "base":
        return method._replace(label="SGD" if recipe.optimizer == "sgd" else "AdamW")
    return method


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up; then half a cosine to zero at the last step, or the peak. The peak may be traced."""
    steps = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if not 0 <= warmup < steps:
        raise ValueError(f"A warm-up of {recipe.warmup_epochs} epochs does not fit into {recipe.epochs}.")
    if recipe.schedule == "constant":
        share = optax.linear_schedule(0.0 if warmup else 1.0, 1.0, warmup)
    else:
        share = optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, steps)
    return lambda step: jnp.asarray(recipe.learning_rate * share(step))


def optimizer(recipe: Recipe, loss_fn: LossFn, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The method and its base as one optax chain. The numbers in the recipe may be traced."""
    method, schedule = method_of(recipe), learning_rate(recipe, steps_per_epoch)
    if recipe.optimizer == "adamw":
        base = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=recipe.weight_decay)
    else:
        base = optax.chain(optax.add_decayed_weights(recipe.weight_decay), optax.sgd(schedule, recipe.momentum))
    if method.stage is not None:
        stage = method.stage(loss_fn, recipe)
        if method.is_late:
            stage = cj.late(stage, recipe.late_start, recipe.epochs * steps_per_epoch)
        return optax.chain(stage, base)
    assert method.around is not None
    return optax.with_extra_args_support(method.around(loss_fn, recipe, base, schedule))


def evaluations_per_step(recipe: Recipe, opt_state: Any) -> float:
    """Gradient evaluations per step, from the count of full steps where a policy skips some."""
    full, full_steps = method_of(recipe).evaluations, optax.tree.get(opt_state, "full_steps")
    if full_steps is None:
        return float(full)
    return 1 + (full - 1) * float(full_steps) / max(float(optax.tree.get(opt_state, "steps")), 1)
