"""Every member of the family as an optimizer for the comparison: the sharpness-aware gradient, then the base.

Only SGD, SAM and CR-SAM have settings of their own, chosen by the search. The one-sided relatives take SAM's
learning rate and radius, the variants of CR-SAM take CR-SAM's, and what is left is at the defaults of their papers.
So a row among the relatives shows that a method trains and what it costs, not how good it can be.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import optax

import crsam_jax as cj
from experiments import configs

LossFn = Callable[..., Any]


class SamSettings(Protocol):
    """What SAM and its one-sided relatives take from a configuration."""

    @property
    def rho(self) -> float: ...


class CrSamSettings(SamSettings, Protocol):
    """What CR-SAM and its variants take."""

    @property
    def alpha(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def penalty(self) -> Literal["log", "linear"]: ...
    @property
    def offset(self) -> float: ...
    @property
    def max_penalty_ratio(self) -> float | None: ...
    @property
    def evaluation(self) -> Literal["auto", "vmap", "sequential", "ordered"]: ...


class Settings(Protocol):
    """The part of a configuration that methods are built from."""

    @property
    def sam(self) -> SamSettings: ...
    @property
    def crsam(self) -> CrSamSettings: ...


class Method(NamedTuple):
    """How to build a method, and what it costs.

    Attributes:
      label: its name in tables and plots.
      family: whose settings it takes.
      evaluations: of the loss's gradient in a full step.
      build: from the loss, the configuration, the base optimizer and its schedule to the whole optimizer.
      epochs: multiple of the configuration's epochs that it trains for.
    """

    label: str
    family: Literal["sgd", "sam", "crsam"]
    evaluations: int
    build: Callable[[LossFn, Settings, optax.GradientTransformation, optax.Schedule], optax.GradientTransformation]
    epochs: int = 1


def _first(stage: Callable[[LossFn, Settings], optax.GradientTransformation]) -> Any:
    """A method that is one stage before the base optimizer."""
    return lambda loss_fn, config, base, schedule: optax.chain(stage(loss_fn, config), base)


def _crsam(loss_fn: LossFn, config: Settings, **changes: Any) -> optax.GradientTransformationExtraArgs:
    c = config.crsam
    settings = {
        "penalty": c.penalty, "offset": c.offset, "max_penalty_ratio": c.max_penalty_ratio, "evaluation": c.evaluation
    } | changes  # fmt: skip
    return cj.crsam(loss_fn, c.rho, c.alpha, c.beta, has_aux=True, **settings)


def _sam(loss_fn: LossFn, config: Settings, **changes: Any) -> optax.GradientTransformationExtraArgs:
    return cj.sam(loss_fn, config.sam.rho, has_aux=True, **changes)


METHODS: dict[str, Method] = {
    "sgd": Method("SGD", "sgd", 1, lambda loss_fn, config, base, schedule: base),
    "sgd-3x": Method("SGD, 3× epochs", "sgd", 1, lambda loss_fn, config, base, schedule: base, epochs=3),
    "sam": Method("SAM", "sam", 2, _first(_sam)),
    "asam": Method("ASAM", "sam", 2, _first(lambda f, c: cj.asam(f, has_aux=True))),
    "rsam": Method("R-SAM", "sam", 3, _first(lambda f, c: cj.rsam(f, c.sam.rho, has_aux=True))),
    "wsam": Method("WSAM, coupled", "sam", 2, _first(lambda f, c: cj.wsam(f, has_aux=True))),
    "decoupled-wsam": Method(
        "WSAM, decoupled", "sam", 2,
        lambda f, c, base, schedule: cj.decoupled_wsam(f, base, schedule, has_aux=True),
    ),
    "gsam": Method("GSAM", "sam", 2, _first(lambda f, c: cj.gsam(f, c.sam.rho, has_aux=True))),
    "gradient-norm": Method(
        "gradient-norm penalty", "sam", 2, _first(lambda f, c: cj.gradient_norm_penalty(f, c.sam.rho, has_aux=True))
    ),
    "esam": Method("ESAM's perturbation", "sam", 2, _first(lambda f, c: _sam(f, c, ascent=cj.dropped_ascent()))),
    "ssam": Method("SSAM, dynamic", "sam", 2, _first(lambda f, c: _sam(f, c, ascent=cj.dynamic_sparse_ascent()))),
    "momentum-sam": Method(
        "Momentum-SAM's direction", "sam", 2, _first(lambda f, c: _sam(f, c, ascent=cj.momentum_ascent()))
    ),
    "friendly-sam": Method("Friendly SAM", "sam", 2, _first(lambda f, c: _sam(f, c, ascent=cj.friendly_ascent()))),
    "sam-every-2": Method("SAM every 2nd step", "sam", 2, _first(lambda f, c: cj.periodic(_sam(f, c), 2))),
    "look-sam": Method("LookSAM, k = 5", "sam", 2, _first(lambda f, c: cj.look(_sam(f, c), 5))),
    "ae-sam": Method("AE-SAM's policy", "sam", 2, _first(lambda f, c: cj.adaptive_policy(_sam(f, c)))),
    "crsam": Method("CR-SAM", "crsam", 3, _first(_crsam)),
    "crsam-linear": Method("CR-SAM, linear", "crsam", 3, _first(lambda f, c: _crsam(f, c, penalty="linear"))),
    "crsam-eq7": Method(
        "CR-SAM, eq. 7, κ = 0.5", "crsam", 3, _first(lambda f, c: _crsam(f, c, offset=0.0, max_penalty_ratio=0.5))
    ),
    "crsam-gradients": Method(
        "CR-SAM, gradient differences", "crsam", 3, _first(lambda f, c: _crsam(f, c, differences="gradients"))
    ),
    "crsam-random": Method(
        "CR-SAM, 1 random pair", "crsam", 4, _first(lambda f, c: _crsam(f, c, probes=cj.random_probes()))
    ),
    "crsam-adaptive": Method(
        "CR-SAM along ASAM's direction", "crsam", 3, _first(lambda f, c: _crsam(f, c, ascent=cj.adaptive_ascent()))
    ),
    "crsam-every-2": Method("CR-SAM every 2nd step", "crsam", 3, _first(lambda f, c: cj.periodic(_crsam(f, c), 2))),
    "crsam-look": Method("CR-SAM + LookSAM, k = 5", "crsam", 3, _first(lambda f, c: cj.look(_crsam(f, c), 5))),
    "crsam-ae": Method("CR-SAM + AE-SAM", "crsam", 3, _first(lambda f, c: cj.adaptive_policy(_crsam(f, c)))),
}  # fmt: skip


def settings_of(config: configs.Digits, name: str) -> configs.Settings:
    """The settings that a method takes from the configuration."""
    settings: configs.Settings = getattr(config, METHODS[name].family)
    return settings


def with_settings(config: configs.Digits, name: str, settings: configs.Settings) -> configs.Digits:
    """The configuration with other settings for the method's family."""
    return dataclasses.replace(config, **{METHODS[name].family: settings})  # type: ignore[arg-type]


def evaluations_per_step(name: str, opt_state: Any) -> float:
    """Gradient evaluations per step, from the count of full steps where a policy skips some."""
    full = METHODS[name].evaluations
    full_steps = optax.tree.get_all_with_path(opt_state, "full_steps")
    if not full_steps:
        return full
    [(_, taken)] = full_steps
    [(_, steps)] = optax.tree.get_all_with_path(opt_state, "steps")
    return 1 + (full - 1) * float(taken) / max(float(steps), 1)
