"""CR-SAM: its rule, eq. 7 of the paper, the transformation, and its gradient as a pure function.

By theorem 1 S = L⁺ + L⁻ − 2L ≈ ρ² vᵀHv and D = L⁺ − L⁻ ≈ 2ρ vᵀ∇L.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from crsam_jax._checks import check_choice, explains_foreign_arguments
from crsam_jax._loss import LossBinder, LossFn, checked_loss
from crsam_jax._parallel import Execution
from crsam_jax._penalty import checked_numbers, log_weight, with_penalty
from crsam_jax._random_probes import RandomProbes, random_curvature_penalty
from crsam_jax._trees import Params
from crsam_jax.ascents import Ascent, Mask
from crsam_jax.engine import (
    NOISE_ULPS,
    Differences,
    Method,
    Outcome,
    Rule,
    Scalar,
    SharpnessAwareState,
    Step,
    loss_differences,
    sharpness_aware,
    two_sided_rule,
)

Form: TypeAlias = Literal["log", "linear"]
Measure: TypeAlias = Literal["losses", "gradients"]


def curvature_penalty(
    form: Form,
    alpha: optax.ScalarOrSchedule,
    beta: optax.ScalarOrSchedule,
    offset: optax.ScalarOrSchedule,
    max_penalty_ratio: optax.ScalarOrSchedule | None,
    differences: Measure,
) -> Rule:
    """g⁺ + a (g⁺+g⁻−2g) + b (g⁺−g⁻) with a = α/(δ+S) and b = β/(δ+D), or a = α and b = β in the linear form.

    A logarithm whose argument is not positive, or is rounding noise, is left out.
    """
    check_choice("penalty", form, get_args(Form))
    check_choice("differences", differences, get_args(Measure))
    measure = loss_differences if differences == "losses" else gradient_differences

    def combine(
        step: Step,
        alpha: jax.Array,
        beta: jax.Array,
        offset: jax.Array,
        max_penalty_ratio: jax.Array | None = None,
    ) -> Outcome:
        if form == "log":
            found = measure(step)
            a, a_is_off = log_weight(alpha, offset + found.second, found.second_noise)
            b, b_is_off = log_weight(beta, offset + found.first, found.first_noise)
        else:
            a, b, a_is_off, b_is_off = alpha, beta, jnp.bool_(False), jnp.bool_(False)
        penalty = (0.0, 2 * b, a - b)  # a s + b (g⁺ − g⁻), where g⁺ − g⁻ = 2d − s
        return with_penalty(step, penalty, jnp.isfinite(step.loss_minus), a_is_off | b_is_off, max_penalty_ratio)

    return two_sided_rule(combine, measure, checked_numbers(alpha, beta, offset, max_penalty_ratio))


def gradient_differences(step: Step) -> Differences:
    """S ≈ (ρ/2)⟨v, g⁺ − g⁻⟩ and D ≈ ρ⟨v, g⁺ + g⁻⟩, by the trapezoid rule along v, in error O(ρ⁴) and O(ρ³).

    They need no losses, and so survive a loss that is rounded to half precision.
    """
    second = step.rho / 2 * step.slope((0.0, 2.0, -1.0))
    first = step.rho * step.slope((2.0, 0.0, 1.0))
    noise = jnp.finfo(first.dtype).eps * NOISE_ULPS * abs(first)
    return Differences(second, first, noise, noise)


@explains_foreign_arguments
def crsam(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.1,
    alpha: optax.ScalarOrSchedule = 0.1,
    beta: optax.ScalarOrSchedule = 0.01,
    *,
    penalty: Form = "log",
    offset: optax.ScalarOrSchedule = 1.0,
    max_penalty_ratio: optax.ScalarOrSchedule | None = None,
    differences: Measure = "losses",
    probes: RandomProbes | None = None,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CR-SAM: sharpness-aware minimization with a penalty on the normalized Hessian trace.

    With :math:`v = g/\|g\|`, :math:`L^\pm = L(w \pm \rho v)`, :math:`g^\pm = \nabla L(w \pm \rho v)`,
    :math:`S = L^+ + L^- - 2L` and :math:`D = L^+ - L^-`, the gradient becomes

    .. math::

      g^+ + \alpha \frac{g^+ + g^- - 2g}{\delta + S} + \beta \frac{g^+ - g^-}{\delta + D},

    the gradient of :math:`L(w+\rho v) + \alpha \log(\delta + S) + \beta \log(\delta + D)` with v held
    constant. It comes first in a chain and is fed with the gradient of ``loss_fn`` at the same params and
    with the same arguments as ``update`` gets; clipping, weight decay and momentum follow it. A step costs the
    caller's gradient and two more, at w + ρv and w − ρv, which are independent of each other.

    Three forms of the penalty:

    * ``"log"`` with δ = ``offset`` = 0 is the paper's eq. 7 to the letter. At the paper's own α and β it
      drowns the loss and training collapses; bound it with ``max_penalty_ratio``, or choose α, β far smaller.
    * ``"linear"``, :math:`g^+ + \alpha (g^+ + g^- - 2g) + \beta (g^+ - g^-)`, is the authors' released
      code, which the paper's α and β belong to. ``offset`` has no effect.
    * ``"log"`` with δ = 1, the default, agrees with the released code to first order in S and D, and is
      defined wherever S > −1 and D > −1.

    Whatever is undefined is left out, step by step, and counted in ``guarded_steps``: a logarithm whose
    argument is not positive or is below the rounding noise of the losses; the penalty, where g⁻ or L⁻ is
    not finite (the result is SAM's gradient); the whole method, where g⁺ or L⁺ is not finite or g is zero
    (the result is g). A g that is not finite passes through unchanged. ρ = 0 gives g and α = β = 0 gives
    SAM, exactly.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, a real floating scalar, or ``(loss, aux)`` with
        ``has_aux=True``. Its arguments after params (batch, rng, model state, ...) are taken by name from the
        extra arguments of ``update``, others are ignored; with ``**kwargs`` it gets all but optax's ``value``,
        ``grad`` and ``value_fn``. It must be pure: it is traced several times. Settings that are not arrays
        (``train=True``) are closed over. ``None``: the loss is given at each ``update``, as
        ``value_fn=lambda params: ...`` (optax's name for it in line searches) or ``obj_fn=``.
      rho: ρ ≥ 0, the distance to the perturbed points in parameter space, a number or schedule.
      alpha: α ≥ 0, weight of the curvature term, a number or schedule.
      beta: β ≥ 0, weight of the gradient-norm term, a number or schedule. At α = β the linear form does not
        depend on g⁻.
      penalty: ``"log"`` or ``"linear"``.
      offset: δ ≥ 0 in the logarithms, in units of the loss.
      max_penalty_ratio: κ ≥ 0; the penalty's gradient is scaled down to at most κ‖g⁺‖, norms over the whole
        tree. ``None``: no bound.
      differences: ``"losses"``: S and D are differences of losses, as in the paper; ``"gradients"``: S is
        (ρ/2)⟨v, g⁺ − g⁻⟩ and D is ρ⟨v, g⁺ + g⁻⟩ (trapezoid rule), for losses that ``loss_fn`` itself rounds to
        half precision, where a difference of losses is noise.
      probes: ``None``: the penalty looks along v, as the paper's algorithm does; :func:`random_probes`: along
        random directions, as its eq. 7 does. The logarithmic penalty and differences of losses only.
      ascent: the rule for v; ``None`` is :func:`crsam_jax.ascents.gradient_ascent`, the paper's.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``. The aux at the perturbed points is dropped: keep
        the model state (BatchNorm statistics) of your own pass at w.
      mask: which part of the params to perturb: a prefix of params with bool leaves, or a function from
        params to one (declare that static under ``optax.inject_hyperparams``). The gradient returned covers
        all of them.
      execution: how the loss is evaluated at the points: strategy, axes of a mesh. ``None`` is the default of
        :class:`crsam_jax.Execution`.

    Returns:
      A transformation whose ``update(grads, state, params, loss=loss, **kwargs)`` returns a gradient with the
      structure, shapes and dtypes of ``grads``. ``loss`` is L(w), which the caller has from ``value_and_grad``;
      without it L(w) is evaluated again. The state holds the step count and
      :class:`crsam_jax.diagnostics.TwoSidedDiagnostics`.

    Raises:
      TypeError: at construction, if ``loss_fn`` is not callable or an argument has the wrong type; at
        ``update``, if an argument of ``loss_fn`` is missing, the loss is not a scalar, ``has_aux`` does not
        match, or a leaf is complex or integer.
      ValueError: at construction, if a constant is negative or not finite or a name is unknown; at ``update``, if
        ``params`` is None or hidden by a mask, or the gradient does not fit params.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from crsam_jax import crsam
      >>> def loss_fn(params, batch):
      ...   x, y = batch
      ...   return jnp.mean((x @ params["w"] - y) ** 2)
      >>> tx = optax.chain(crsam(loss_fn, rho=0.1, alpha=0.1, beta=0.01), optax.sgd(0.1, momentum=0.9))
      >>> params = {"w": jnp.zeros(2)}
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def step(params, opt_state, batch):
      ...   loss, grads = jax.value_and_grad(loss_fn)(params, batch)
      ...   updates, opt_state = tx.update(grads, opt_state, params, loss=loss, batch=batch)
      ...   return optax.apply_updates(params, updates), opt_state, loss
      >>> batch = jnp.eye(2), jnp.array([1.0, -1.0])
      >>> for _ in range(60):
      ...   params, opt_state, loss = step(params, opt_state, batch)
      >>> print(params["w"])
      [ 1. -1.]
      >>> print(optax.tree.get(opt_state, "curvature"))  # the Hessian is the identity
      1.0

    References:
      Wu, Luo, Wunsch, "CR-SAM: Curvature Regularized Sharpness-Aware Minimization", AAAI 2024,
      arXiv 2312.13555, eq. 5-7, theorem 1 and algorithm 1.
    """
    rule = _rule(alpha, beta, penalty, offset, max_penalty_ratio, differences, probes, mask)
    return sharpness_aware(loss_fn, rule, rho, ascent=ascent, has_aux=has_aux, mask=mask, execution=execution)


def _rule(
    alpha: optax.ScalarOrSchedule,
    beta: optax.ScalarOrSchedule,
    penalty: Form,
    offset: optax.ScalarOrSchedule,
    max_penalty_ratio: optax.ScalarOrSchedule | None,
    differences: Measure,
    probes: RandomProbes | None,
    mask: Mask | None,
) -> Rule:
    if probes is None:
        return curvature_penalty(penalty, alpha, beta, offset, max_penalty_ratio, differences)
    _check_random_probes(probes, penalty, differences)
    return random_curvature_penalty(probes, alpha, beta, offset, max_penalty_ratio, mask)


def _check_random_probes(probes: RandomProbes, penalty: Form, differences: Measure) -> None:
    if not isinstance(probes, RandomProbes):
        raise TypeError(f"probes must be None or crsam_jax.random_probes(...), got {probes!r}.")
    if penalty != "log" or differences != "losses":
        raise ValueError(
            "Random probes go with penalty='log' and differences='losses'. The linear form has no meaning for them: "
            f"the expectation of D is zero. Got penalty={penalty!r}, differences={differences!r}."
        )


class GradientFn(NamedTuple):
    """CR-SAM's gradient as pure functions, made by :func:`crsam_gradient`; call it for a gradient without memory.

    Attributes:
      init: ``params -> state``.
      step: ``(params, grads, state, *, loss=None, **kwargs) -> (gradient, new_state)``; ``new_state.diagnostics`` says
        what was seen, and counts add up.
      draws: whether it draws random directions, which depend on the step count in the state.
    """

    init: Callable[[Params], SharpnessAwareState]
    step: Callable[..., tuple[Params, SharpnessAwareState]]
    draws: bool

    def __call__(self, params: Params, grads: Params = None, *args: Any, **kwargs: Any) -> tuple[Params, Any]:
        """The gradient at params and the diagnostics of this call, whose counts are 0 or 1.

        Raises:
          ValueError: if the method remembers or draws anything from step to step: every call would start afresh.
        """
        state = self.init(params)
        if self.draws or jax.tree.leaves(state.ascent):
            raise ValueError(
                "This ascent, or random_probes, carries a state from step to step, and a call would start it afresh "
                "each time. Keep the state: state = gradient_fn.init(params), then gradient, state = "
                "gradient_fn.step(params, grads, state, ...)."
            )
        gradient, state = self.step(params, grads, state, *args, **kwargs)
        return gradient, state.diagnostics


@explains_foreign_arguments
def crsam_gradient(
    loss_fn: LossFn,
    rho: Scalar = 0.1,
    alpha: Scalar = 0.1,
    beta: Scalar = 0.01,
    *,
    penalty: Form = "log",
    offset: Scalar = 1.0,
    max_penalty_ratio: Scalar | None = None,
    differences: Measure = "losses",
    probes: RandomProbes | None = None,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> GradientFn:
    """CR-SAM's gradient as a pure function, for those who write their own loop.

    Args:
      loss_fn: and all other arguments: as in :func:`crsam_jax.crsam`, but rho, alpha, beta, offset and
        max_penalty_ratio are numbers or traced arrays; only :func:`crsam_jax.crsam` takes schedules.

    Returns:
      ``gradient_fn(params, grads=None, *, loss=None, **kwargs) -> (gradient, diagnostics)``. ``grads`` is the gradient
      of ``loss_fn`` at params and ``loss`` its value; both are computed if they are None; ``kwargs`` go to
      ``loss_fn`` by name. An ascent that remembers, and random probes, need a state from step to step: see
      :class:`GradientFn`.

    Raises:
      TypeError: for a schedule, and as :func:`crsam_jax.crsam`.
      ValueError: as :func:`crsam_jax.crsam`; if ``grads`` is None under an axis, where only the caller can average
        it; at a call, if the method has a memory.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import crsam_gradient
      >>> loss_fn = lambda w, scale: 0.5 * scale * jnp.sum(w**2)
      >>> gradient_fn = crsam_gradient(loss_fn, rho=1.0, alpha=0.0, beta=0.0)
      >>> gradient, diagnostics = gradient_fn(jnp.array([3.0, 4.0]), scale=2.0)
      >>> print(gradient, diagnostics.curvature)  # 2(w + w/‖w‖), vᵀHv = 2
      [7.2 9.6] 2.0
    """
    numbers = {"rho": rho, "alpha": alpha, "beta": beta, "offset": offset, "max_penalty_ratio": max_penalty_ratio}
    for name, value in numbers.items():
        if callable(value):
            raise TypeError(f"{name} must be a number here, got {value!r}: there is no step count for a schedule.")
    bind = LossBinder(loss_fn, has_aux, call="gradient_fn(params, grads, {})")
    rule = _rule(alpha, beta, penalty, offset, max_penalty_ratio, differences, probes, mask)
    method = Method.of(rule, rho, ascent, mask, execution)

    def step(
        params: Params, grads: Params, state: SharpnessAwareState, *args: Any, loss: Any = None, **kwargs: Any
    ) -> tuple[Params, SharpnessAwareState]:
        bind.refuse_positional(args)
        bound, loss = bind(kwargs), checked_loss(loss)
        if grads is None:
            if method.execution.axis_name is not None:
                raise ValueError("With axis_name, pass grads, averaged over the axis.")
            loss, grads = jax.value_and_grad(bound)(params)
        return method.gradient(bound, grads, state, params, loss)

    return GradientFn(method.init, step, probes is not None)
