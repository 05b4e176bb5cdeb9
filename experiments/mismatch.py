"""A warning, once, if the gradient did not belong to the loss in most steps of an epoch."""

from typing import Any

import optax


class Watch:
    """Compares the counts of mismatched steps from epoch to epoch; steps that a policy skips do not count."""

    def __init__(self, opt_state: Any):
        self._before, self._has_warned = _counts(opt_state), False

    def warning(self, opt_state: Any) -> str | None:
        """The warning after an epoch; None if all is well, and after the first warning."""
        now = _counts(opt_state)
        steps, mismatched = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        if self._has_warned or 2 * mismatched <= steps:
            return None
        self._has_warned = True
        return (
            f"Warning: in {mismatched} of {steps} steps the gradient did not fit the losses at the probes. Likely "
            "causes: it is scaled, clipped or of other data; the method comes after another transformation; or rho "
            "is far too large."
        )


def _counts(opt_state: Any) -> tuple[int, int]:
    """Full steps so far, and mismatched ones; zeros for the base optimizer, and for methods that cannot tell."""
    for _, state in optax.tree.get_all_with_path(opt_state, "SharpnessAwareState"):
        if hasattr(state.diagnostics, "mismatched_steps"):
            return int(state.step_count), int(state.diagnostics.mismatched_steps)
    return 0, 0
