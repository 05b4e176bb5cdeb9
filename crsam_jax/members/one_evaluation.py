"""MSAM and S²-SAM: SAM with a perturbation from memory, so that the only gradient of a step is that at w + e."""

import optax

from crsam_jax.members.shifted import shifted
from crsam_jax.step.checks import check_number
from crsam_jax.step.types import Mask, Scalar, ScalarOrSchedule


def msam(
    base_optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.3,
    decay: Scalar = 0.9,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: the gradient at :math:`w_t - \rho\, m_t/\|m_t\|`, one evaluation a step.

    .. math::

        \begin{align*}
        g_t &= \nabla L(w_t - \rho\, m_t / \|m_t\|), \\
        w_{t+1} &= w_t + \mathrm{base}(g_t, w_t), \\
        m_{t+1} &= \mu\, m_t + g_t, \qquad m_0 = 0.
        \end{align*}

    The minus sign is the paper's: the perturbation goes along the step that momentum takes, as Nesterov's does, but by
    a fixed length. The first gradient is that at w₀.

    **The params that the caller holds are the shifted ones.** Loss and gradient of the training step are those there;
    evaluate, average and export :func:`eval_params`. The transformation is the whole optimizer, and what changes its
    updates afterwards breaks the shift: clipping and the like go before it in a chain, or into ``base_optimizer``,
    which is called at w (weight decay shrinks w) and must not evaluate the loss itself.

    Where ∇L(w̃) is not finite, the base optimizer's state, m and the count stay as they are and the shift is undone, so
    that the next gradient is that at w. It is that, too, after m came out zero or overflowed, or where a schedule's ρ
    is negative or not finite. All of these are counted in ``guarded_steps``.

    Args:
      base_optimizer: any optax optimizer, with its learning rate.
      rho: ρ ≥ 0, a number or a schedule: ρ(t) is the radius at which the t-th gradient is taken, from t = 0. Under
        ``optax.inject_hyperparams`` the value at one update sets the shift for the next gradient.
      decay: μ in [0, 1), that of the base optimizer's momentum in the paper: ``momentum`` of SGD, ``b1`` of Adam. m is
        kept apart from the base optimizer's, at the cost of one vector, so that any base optimizer will do.
      mask: which part of the params to perturb: a prefix of params with bool leaves, or a function from params to one
        (declare that static under ``optax.inject_hyperparams``). The norm runs over that part.

    Returns:
      A transformation from the gradient at the shifted params to the updates that lead to the next shifted params,
      structure and dtypes of the gradient. It needs no loss, only ``params``.

    Raises:
      TypeError: if ``base_optimizer`` is no transformation or a number is none; at ``update``, if a leaf is complex or
        integer.
      ValueError: if a number is out of range; at ``update``, if params is None or the gradient does not fit it.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from crsam_jax import eval_params, msam
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = msam(optax.sgd(0.5), rho=1.0)
      >>> params = jnp.array([0.0, 8.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, eval_params(state, params))  # w = [0, 4], shifted by −m/‖m‖
      [0. 3.] [0. 4.]

    References:
      Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", arXiv
      2401.12033, algorithm 1. The authors' code adds SGD's weight decay at w̃. ρ = 0.3 is its default; its commands
      train with ρ = 3.
    """
    check_number("decay", decay, below=1)
    return shifted("msam", base_optimizer, rho, decay, -1.0, mask)


def s2sam(
    base_optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""S²-SAM: the gradient at :math:`w_t + \rho\, g_{t-1}/\|g_{t-1}\|`, one evaluation a step.

    SAM with the ascent direction of the step before: :math:`g_t = \nabla L(w_t + \rho\, g_{t-1}/\|g_{t-1}\|)` with
    :math:`g_{-1} = 0`, and the base optimizer's step with g_t from w_t.

    All that :func:`msam` says of the shifted params, :func:`eval_params` and what is guarded holds here too.

    Args:
      base_optimizer: any optax optimizer, with its learning rate.
      rho: ρ ≥ 0, a number or schedule.
      mask: which part of the params to perturb.

    Returns:
      A transformation from the gradient at the shifted params to the updates that lead to the next shifted params.

    Raises:
      TypeError, ValueError: as :func:`msam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from crsam_jax import eval_params, s2sam
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = s2sam(optax.sgd(0.5), rho=1.0)
      >>> params = jnp.array([0.0, 8.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, eval_params(state, params))  # w = [0, 4], shifted by g/‖g‖
      [0. 5.] [0. 4.]

    References:
      Ji et al., "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse
      Training", NeurIPS 2024.
    """
    return shifted("s2sam", base_optimizer, rho, None, 1.0, mask)
