"""How a step is carried out, apart from what it computes: the strategy, and the axes of a mesh."""

import dataclasses
from typing import get_args

from crsam_jax.step.checks import check_choice
from crsam_jax.step.types import Strategy


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the loss is evaluated at the points of a step. The numbers are the same up to rounding, whatever it says.

    Attributes:
      strategy: in which order the points are evaluated. ``"ordered"``: one after the other, so that one set of
        activations is alive at a time, SAM's memory. ``"sequential"``: one plain evaluation a point, which the compiler
        may overlap. ``"vmap"``: all points in one batched evaluation; batching over params makes grouped
        convolutions and batched matrix products of what were plain ones, and takes the memory of all points at once.
        ``"auto"``: what measurements favour, which today is ``"ordered"`` on every platform.
      axis_name: axis of ``shard_map`` or ``pmap`` over which losses and gradients of the points are averaged; the
        incoming gradient must be averaged already. Not needed under ``jit`` with sharded arrays.
      sync_perturbation: under ``axis_name``: ``True``: one perturbation for all, from averaged gradients. ``False``,
        the m-sharpness of SAM: the incoming gradients are those of each part of the batch, not averaged; every part has
        its own v, differences and fallbacks, and the results are averaged at the end, with the diagnostics (a step
        counts as guarded if any part was). On one device, ``jax.vmap(..., axis_name=...)`` over parts of the batch
        does it.
      probe_axis: a mesh axis whose devices share the points out among them, each device its own points on the whole
        of what its group holds of the batch. Under ``jit`` the mesh is that of ``jax.set_mesh``, and arrays may be
        sharded over its other axes as ever; under ``shard_map`` the arguments of the loss must be the same along it.

    Raises:
      ValueError: for an unknown strategy, or if both axes are one.
      TypeError: if an axis is no string, or ``sync_perturbation`` is no bool.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> execution = crsam_jax.Execution(strategy="ordered", axis_name="data")
      >>> tx = crsam_jax.crsam(lambda w: jnp.sum(w**2), execution=execution)
    """

    strategy: Strategy = "auto"
    axis_name: str | None = None
    sync_perturbation: bool = True
    probe_axis: str | None = None

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, get_args(Strategy))
        for name in ("axis_name", "probe_axis"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                raise TypeError(f"{name} must be the name of one mesh axis or None, got {value!r}.")
        if not isinstance(self.sync_perturbation, bool):
            raise TypeError(f"sync_perturbation must be True or False, got {self.sync_perturbation!r}.")
        if self.probe_axis is not None and self.probe_axis == self.axis_name:
            raise ValueError(
                f"axis_name and probe_axis are both {self.axis_name!r}: along the first the devices hold different "
                "parts of the batch, along the second the same. Give the mesh another axis for the probes."
            )

    @property
    def averaging_axis(self) -> str | None:
        """The axis that each evaluation is averaged over."""
        return self.axis_name if self.sync_perturbation else None

    @property
    def local_axis(self) -> str | None:
        """The axis along which each part of the batch takes a step of its own."""
        return None if self.sync_perturbation else self.axis_name


def checked_execution(execution: Execution | None) -> Execution:
    """The given settings, or the default ones if there are none.

    Raises:
      TypeError: if what was given is not an Execution.
    """
    if execution is None:
        return Execution()
    if not isinstance(execution, Execution):
        raise TypeError(
            f"execution must be a crsam_jax.Execution or None, got {execution!r}; for a strategy by name write "
            'execution=crsam_jax.Execution(strategy="ordered").'
        )
    return execution
