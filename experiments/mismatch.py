"""A warning, once, if the gradient of most steps of an epoch was not that of the loss."""

from typing import Any

import jax

import crsam_jax

MESSAGE = (
    "Warning: in {mismatched} of {steps} steps the gradient did not fit the losses at the probes. Likely causes: it "
    "is scaled, clipped or of other data; the method stands behind another transformation; or rho is far too large."
)


class Watch:
    """Compares the counts of mismatched steps from epoch to epoch; steps that a policy skips do not count.

    Args:
      opt_state: where training starts or goes on.
    """

    def __init__(self, opt_state: Any):
        self._before = _counts(opt_state)
        self._has_warned = False

    def warning(self, opt_state: Any) -> str | None:
        """What to say after an epoch; None where all is well, and after the first warning."""
        now = _counts(opt_state)
        steps, mismatched = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        if self._has_warned or 2 * mismatched <= steps:
            return None
        self._has_warned = True
        return MESSAGE.format(mismatched=mismatched, steps=steps)


def _counts(opt_state: Any) -> tuple[int, int]:
    """Full steps so far, and mismatched ones; zeros for the base optimizer, and for methods that cannot tell."""

    def is_member(node: Any) -> bool:
        return isinstance(node, crsam_jax.SharpnessAwareState)

    for node in jax.tree.leaves(opt_state, is_leaf=is_member):
        if is_member(node) and hasattr(node.diagnostics, "mismatched_steps"):
            return int(node.count), int(node.diagnostics.mismatched_steps)
    return 0, 0
