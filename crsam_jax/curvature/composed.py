"""A loss in two parts, which the Gauss-Newton and Fisher matrices need."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from crsam_jax._loss import LossBinder


@dataclasses.dataclass(frozen=True)
class Composed:
    r"""The loss :math:`L(w) = \tfrac1n \sum_i \ell(f(w, x_i), y_i)`, given as f and ℓ.

    It can be called like any loss, ``loss_fn(params, **batch) -> loss``, for training and for every measure. In
    addition it allows ``matrix="gauss_newton"`` and ``matrix="empirical_fisher"``.

    Attributes:
      outputs_fn: ``outputs_fn(params, **batch) -> outputs``, f of all examples, a pytree.
      losses_fn: ``losses_fn(outputs, **batch) -> losses`` of shape [examples], or their mean, which is enough
        for Gauss-Newton. Both functions take the arguments after the first one by name, each those it needs.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = curvature.Composed(lambda w, batch: batch[0] @ w, lambda outputs, batch: (outputs - batch[1]) ** 2)
      >>> print(loss_fn(jnp.ones(1), batch=(jnp.array([[1.0], [2.0]]), jnp.array([0.0, 0.0]))))  # (1 + 4)/2
      2.5
    """

    outputs_fn: Callable[..., Any]
    losses_fn: Callable[..., Any]

    def __call__(self, params: Any, /, **batch: Any) -> jax.Array:
        """The mean loss."""
        return self.mean_loss(self.outputs(params, batch), batch)

    def example_losses(self, params: Any, /, **batch: Any) -> jax.Array:
        """The loss of each example, [examples]; the argument that :func:`approximation_ratio` takes.

        Raises:
          TypeError: if ``losses_fn`` returns another shape.
        """
        losses = self._losses(self.outputs(params, batch), batch)
        if losses.ndim != 1:
            raise TypeError(f"losses_fn must return the loss of each example, [examples]; got shape {losses.shape}.")
        return losses

    def outputs(self, params: Any, batch: Mapping[str, Any]) -> Any:
        """The outputs f(w, x) for the examples of a batch."""
        return self.outputs_fn(params, **_arguments(self.outputs_fn, batch))

    def mean_loss(self, outputs: Any, batch: Mapping[str, Any]) -> jax.Array:
        """The mean loss as a function of the outputs."""
        return jnp.mean(self._losses(outputs, batch))

    def _losses(self, outputs: Any, batch: Mapping[str, Any]) -> jax.Array:
        return jnp.asarray(self.losses_fn(outputs, **_arguments(self.losses_fn, batch)))


def _arguments(function: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    return LossBinder(function, has_aux=False, call="data=dict({})").arguments(batch)
