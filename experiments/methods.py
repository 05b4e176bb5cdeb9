"""Every member of the family as an optimizer: the sharpness-aware gradient, then the base.

SAM, ASAM, CR-SAM, MSAM and S²-SAM have settings of their own in a recipe. The one-sided relatives take SAM's radius,
the variants of CR-SAM take CR-SAM's settings, and what is left is at the defaults of their papers.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

import crsam_jax as cj
from experiments.recipes import Recipe

LossFn = Callable[..., Any]


class Method(NamedTuple):
    """How to build a method, and what it costs.

    Attributes:
      label: its name in tables and plots.
      family: whose settings it takes, where it has none of its own.
      evaluations: of the loss's gradient on a batch in a full step.
      build: from the loss, the recipe, the base optimizer, its schedule and the number of steps to the whole optimizer.
      tunes: what a search looks for, beside the learning rate.
      is_shifted: whether the params in training are perturbed ones; see ``crsam_jax.eval_params``.
      part: the ascent, and with it the loss that is logged, is that of every ``part``-th example of a batch.
    """

    label: str
    family: Literal["base", "sam", "crsam"]
    evaluations: float
    build: Callable[[LossFn, Recipe, optax.GradientTransformation, optax.Schedule, int], optax.GradientTransformation]
    tunes: tuple[str, ...]
    is_shifted: bool = False
    part: int = 1


def _first(
    label: str, evaluations: float, stage: Callable[[LossFn, Recipe], optax.GradientTransformation], tunes: str = ""
) -> Method:
    """A one-sided method that is one stage before the base optimizer."""
    build = lambda loss_fn, recipe, base, schedule, steps: optax.chain(stage(loss_fn, recipe), base)
    return Method(label, "sam", evaluations, build, (tunes or "sam.rho",))


def _two_sided(label: str, stage: Callable[[LossFn, Recipe], Any], evaluations: int = 3) -> Method:
    """A variant of CR-SAM."""
    method = _first(label, evaluations, stage)
    return method._replace(family="crsam", tunes=("crsam.rho", "crsam.alpha", "crsam.beta"))


def _late(method: Method, stage: Callable[[LossFn, Recipe], optax.GradientTransformation]) -> Method:
    """The base optimizer first, and the method in the last part of training."""

    def build(
        loss_fn: LossFn, recipe: Recipe, base: optax.GradientTransformation, schedule: optax.Schedule, steps: int
    ) -> optax.GradientTransformation:
        return optax.chain(cj.late(stage(loss_fn, recipe), recipe.late_start, steps), base)

    return method._replace(label=f"late {method.label}", build=build)


def _crsam(loss_fn: LossFn, recipe: Recipe, **changes: Any) -> optax.GradientTransformationExtraArgs:
    c = recipe.crsam
    settings = {
        "penalty": c.penalty, "offset": c.offset, "max_penalty_ratio": c.max_penalty_ratio,
        "execution": cj.Execution(c.strategy),
    } | changes  # fmt: skip
    return cj.crsam(loss_fn, c.rho, c.alpha, c.beta, has_aux=True, **settings)


def _sam(loss_fn: LossFn, recipe: Recipe, **changes: Any) -> optax.GradientTransformationExtraArgs:
    return cj.sam(loss_fn, recipe.sam.rho, has_aux=True, **changes)


METHODS: dict[str, Method] = {
    "base": Method("base", "base", 1, lambda loss_fn, recipe, base, schedule, steps: base, ()),
    "sam": _first("SAM", 2, _sam),
    "asam": _first("ASAM", 2, lambda f, r: cj.asam(f, r.asam.rho, r.asam.eta, has_aux=True), "asam.rho"),
    "rsam": _first("R-SAM", 3, lambda f, r: cj.rsam(f, r.sam.rho, has_aux=True)),
    "wsam": _first("WSAM, coupled", 2, lambda f, r: cj.wsam(f, r.sam.rho, has_aux=True)),
    "decoupled-wsam": Method(
        "WSAM, decoupled", "sam", 2,
        lambda f, r, base, schedule, steps: cj.decoupled_wsam(f, base, schedule, r.sam.rho, has_aux=True), ("sam.rho",),
    ),
    "gsam": _first("GSAM", 2, lambda f, r: cj.gsam(f, r.sam.rho, has_aux=True)),
    "gradient-norm": _first(
        "gradient-norm penalty", 2, lambda f, r: cj.gradient_norm_penalty(f, r.sam.rho, has_aux=True)
    ),
    "esam": _first("ESAM's perturbation", 2, lambda f, r: _sam(f, r, ascent=cj.dropped_ascent())),
    "ssam": _first("SSAM, dynamic", 2, lambda f, r: _sam(f, r, ascent=cj.dynamic_sparse_ascent())),
    "momentum-sam": _first("Momentum-SAM's direction", 2, lambda f, r: _sam(f, r, ascent=cj.momentum_ascent())),
    "friendly-sam": _first("Friendly SAM", 2, lambda f, r: _sam(f, r, ascent=cj.friendly_ascent())),
    "sam-every-2": _first("SAM every 2nd step", 2, lambda f, r: cj.periodic(_sam(f, r), 2)),
    "look-sam": _first("LookSAM, k = 5", 2, lambda f, r: cj.look(_sam(f, r), 5)),
    "ae-sam": _first("AE-SAM's policy", 2, lambda f, r: cj.adaptive_policy(_sam(f, r))),
    "sam-quarter": _first("SAM, ascent on a quarter", 1.25, lambda f, r: _sam(f, r, ascent_only=True))._replace(part=4),
    "sam-late": _late(_first("SAM", 2, _sam), _sam),
    "msam": Method(
        "MSAM", "sam", 1, lambda f, r, base, schedule, steps: cj.msam(base, r.msam.rho, r.momentum), ("msam.rho",), True
    ),
    "s2sam": Method(
        "S²-SAM", "sam", 1, lambda f, r, base, schedule, steps: cj.s2sam(base, r.s2sam.rho), ("s2sam.rho",), True
    ),
    "crsam": _two_sided("CR-SAM", _crsam),
    "crsam-late": _late(_two_sided("CR-SAM", _crsam), _crsam),
    "crsam-linear": _two_sided("CR-SAM, linear", lambda f, r: _crsam(f, r, penalty="linear")),
    "crsam-eq7": _two_sided("CR-SAM, eq. 7, κ = 0.5", lambda f, r: _crsam(f, r, offset=0.0, max_penalty_ratio=0.5)),
    "crsam-gradients": _two_sided("CR-SAM, gradient differences", lambda f, r: _crsam(f, r, differences="gradients")),
    "crsam-random": _two_sided("CR-SAM, 1 random pair", lambda f, r: _crsam(f, r, probes=cj.random_probes()), 4),
    "crsam-adaptive": _two_sided(
        "CR-SAM along ASAM's direction", lambda f, r: _crsam(f, r, ascent=cj.adaptive_ascent())
    ),
    "crsam-every-2": _two_sided("CR-SAM every 2nd step", lambda f, r: cj.periodic(_crsam(f, r), 2)),
    "crsam-look": _two_sided("CR-SAM + LookSAM, k = 5", lambda f, r: cj.look(_crsam(f, r), 5)),
    "crsam-ae": _two_sided("CR-SAM + AE-SAM", lambda f, r: cj.adaptive_policy(_crsam(f, r))),
}  # fmt: skip
