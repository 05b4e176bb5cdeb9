"""CR-SAM: the transformation, and its gradient as a pure function."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from crsam_jax._checks import ScalarOrSchedule
from crsam_jax._loss import LossBinder, LossFn
from crsam_jax.ascent import Ascent, Mask
from crsam_jax.curvature_penalty import curvature_penalty
from crsam_jax.diagnostics import Diagnostics
from crsam_jax.random_probes import RandomProbes, random_curvature_penalty
from crsam_jax.transform import sharpness_aware


def crsam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.1,
    alpha: ScalarOrSchedule = 0.1,
    beta: ScalarOrSchedule = 0.01,
    *,
    penalty: str = "log",
    offset: ScalarOrSchedule = 1.0,
    max_penalty_ratio: ScalarOrSchedule | None = None,
    differences: str = "losses",
    probes: RandomProbes | None = None,
    ascent: Ascent | None = None,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CR-SAM: sharpness-aware minimization with a penalty on the normalized Hessian trace.

    With :math:`v = g/\|g\|`, :math:`L^\pm = L(w \pm \rho v)`, :math:`g^\pm = \nabla L(w \pm \rho v)`,
    :math:`S = L^+ + L^- - 2L` and :math:`D = L^+ - L^-`, the gradient becomes

    .. math::

      g^+ + \alpha \frac{g^+ + g^- - 2g}{\delta + S} + \beta \frac{g^+ - g^-}{\delta + D},

    the gradient of :math:`L(w+\rho v) + \alpha \log(\delta + S) + \beta \log(\delta + D)` with v held
    constant. It stands first in a chain and is fed with the gradient of ``loss_fn`` at the same params and
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
        (``train=True``) are closed over.
      rho: ρ ≥ 0, the distance to the probes in parameter space, a number or schedule.
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
      ascent: the rule for v; ``None`` is :func:`gradient_ascent`, the paper's.
      evaluation: ``"vmap"``: both probes in one batched evaluation; ``"sequential"``: two plain evaluations,
        which the compiler may overlap; ``"ordered"``: strictly one after the other, for the least memory;
        ``"auto"``: vmap on GPU and TPU, sequential on CPU, decided at lowering. The numbers are the same up to
        rounding. Batching over params turns convolutions into grouped convolutions, so measure before you
        use vmap with a ConvNet.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``. The aux of the probes is dropped: the model state
        (BatchNorm statistics) to keep is that of the caller's own pass at w.
      axis_name: axis of ``shard_map`` or ``pmap`` over which losses and gradients of the probes are averaged; the
        incoming gradient must be averaged already. Not needed under ``jit`` with sharded arrays.
      sync_perturbation: under ``axis_name``: ``True``: one perturbation for all, from averaged gradients.
        ``False``, the m-sharpness of SAM: the incoming gradients are those of each part of the batch, not
        averaged; every part has its own v, S, D and guards, and the results are averaged at the end, with the
        diagnostics (``guarded_steps`` counts a step if any part did). On one device,
        ``jax.vmap(..., axis_name=...)`` over parts of the batch does it.
      mask: which part of the params to perturb: a prefix of params with bool leaves, or a function from
        params to one (declare that static under ``optax.inject_hyperparams``). The gradient returned covers
        all of them.

    Returns:
      A transformation whose ``update(grads, state, params, **kwargs)`` returns a gradient with the structure,
      shapes and dtypes of ``grads``. Its state holds the count and :class:`TwoSidedDiagnostics`.

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
      ...   updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
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
    if probes is None:
        term = curvature_penalty(penalty, alpha, beta, offset, max_penalty_ratio, differences)
    else:
        _check_random_probes(probes, penalty, differences)
        term = random_curvature_penalty(probes, alpha, beta, offset, max_penalty_ratio, mask)
    return sharpness_aware(
        loss_fn, term, rho, ascent=ascent, evaluation=evaluation, has_aux=has_aux, axis_name=axis_name,
        sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip


def _check_random_probes(probes: RandomProbes, penalty: str, differences: str) -> None:
    if not isinstance(probes, RandomProbes):
        raise TypeError(f"probes must be None or crsam_jax.random_probes(...), got {probes!r}.")
    if penalty != "log" or differences != "losses":
        raise ValueError(
            "Random probes go with penalty='log' and differences='losses'. The linear form has no meaning for them: "
            f"the expectation of D is zero. Got penalty={penalty!r}, differences={differences!r}."
        )


def crsam_gradient(
    loss_fn: LossFn,
    rho: float = 0.1,
    alpha: float = 0.1,
    beta: float = 0.01,
    *,
    penalty: str = "log",
    offset: float = 1.0,
    max_penalty_ratio: float | None = None,
    differences: str = "losses",
    probes: RandomProbes | None = None,
    ascent: Ascent | None = None,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> Callable[..., tuple[Any, Diagnostics]]:
    """CR-SAM's gradient as a pure function, for those who write their own loop.

    Args:
      loss_fn: see :func:`crsam`, as for all other arguments. There is no step count here, so rho, alpha, beta, offset
        and max_penalty_ratio are numbers (or traced arrays), and an ascent starts from its initial state.
      rho: ρ.
      alpha: α.
      beta: β.
      penalty: ``"log"`` or ``"linear"``.
      offset: δ.
      max_penalty_ratio: κ.
      differences: ``"losses"`` or ``"gradients"``.
      probes: ``None`` or :func:`random_probes`.
      ascent: the rule for v.
      evaluation: how the probes are evaluated.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis to average over.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

    Returns:
      ``gradient_fn(params, grads=None, **kwargs) -> (gradient, diagnostics)``. ``grads`` is the gradient of
      ``loss_fn`` at params, and is computed if it is None; ``kwargs`` go to ``loss_fn`` by name. ``guarded_steps``
      and ``bounded_steps`` are 0 or 1.

    Raises:
      TypeError: for a schedule, and as :func:`crsam`.
      ValueError: as :func:`crsam`; if ``grads`` is None under ``axis_name``, where only the caller can average it.

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
    tx = crsam(
        loss_fn, rho, alpha, beta, penalty=penalty, offset=offset, max_penalty_ratio=max_penalty_ratio,
        differences=differences, probes=probes, ascent=ascent, evaluation=evaluation, has_aux=has_aux,
        axis_name=axis_name, sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip
    bind = LossBinder(loss_fn, has_aux)

    def gradient_fn(params: Any, grads: Any = None, **kwargs: Any) -> tuple[Any, Diagnostics]:
        if grads is None:
            if axis_name is not None:
                raise ValueError("With axis_name, pass grads, averaged over the axis.")
            grads = jax.grad(bind(kwargs))(params)
        gradient, state = tx.update(grads, tx.init(params), params, **kwargs)
        return gradient, state.diagnostics

    return gradient_fn
