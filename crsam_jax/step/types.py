"""Names for what the library passes around."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax

Params: TypeAlias = Any
"""A pytree of real floating arrays: parameters, or a gradient, direction or point of the same structure."""

Scalar: TypeAlias = float | jax.Array
"""A number known to Python, or a scalar array."""

Schedule: TypeAlias = Callable[[Any], Any]
"""From the step count to a scalar."""

ScalarOrSchedule: TypeAlias = Scalar | Schedule
"""A constant, a traced scalar, or a schedule."""

Loss: TypeAlias = Callable[[Params], jax.Array]
"""A loss of params alone, its other arguments bound."""

ValueAndGrad: TypeAlias = Callable[[Params], tuple[jax.Array, Params]]
"""From a point to the loss and its gradient there."""

GradientFn: TypeAlias = Callable[[Params], Params]
"""From a point, a tree like params, to the gradient of the loss there."""

Mask: TypeAlias = Any
"""A pytree of bools that is a prefix of params, or a function from params to one."""

Strategy: TypeAlias = Literal["auto", "vmap", "sequential", "ordered"]
"""How several points are evaluated, see :class:`crsam_jax.Execution`."""


class Evaluation(NamedTuple):
    """The loss at a point, a scalar in the dtype that the loss has, and its gradient, a tree like params."""

    loss: jax.Array
    grads: Params


class LossFn(Protocol):
    """``loss_fn(params, **kwargs) -> loss``, a real floating scalar, or ``(loss, aux)``."""

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The loss at params."""
