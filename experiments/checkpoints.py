"""Checkpoints of a training run: written in the background, whole or not at all, the newest few kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.program import State


class Checkpoints:
    """The checkpoints of one run, by step.

    Args:
      folder: of the run.
      keep: how many of the newest to keep; all if it is None.
      keep_period: steps; a checkpoint at a multiple is kept for good.
    """

    def __init__(self, folder: Path, keep: int | None = 3, keep_period: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_period, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.folder = (folder / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: State, position: Any) -> None:
        """Starts to write; the state may be donated as soon as this returns."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_flat(state)), position=ocp.args.JsonSave({"position": position})
        )
        self._manager.save(step, args=items)

    def restore(self, like: State, step: int | None = None) -> tuple[State, Any]:
        """The state of a step, the last by default, and the position of the data.

        Args:
          like: a state of the same shapes, where the arrays shall go.
          step: of the checkpoint.

        Raises:
          FileNotFoundError: if there is no such checkpoint, with those that there are.
        """
        step = self.last if step is None else step
        if step not in self.steps:
            raise FileNotFoundError(f"No checkpoint of step {step} in {self.folder}; there are those of {self.steps}.")
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))),
            position=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        leaves = [restored.state[name] for name in _flat(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored.position["position"]

    @property
    def steps(self) -> list[int]:
        """Of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def last(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self.steps, default=None)

    def close(self) -> None:
        """Waits until all is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _flat(state: State) -> dict[str, jax.Array]:
    """Arrays by path: a format that does not depend on the classes of optimizers and networks."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
