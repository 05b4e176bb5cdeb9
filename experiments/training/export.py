"""Parameters of a run as a safetensors file, for other programs."""

from pathlib import Path

import numpy as np

from experiments.settings.configs import Run
from experiments.system import files
from experiments.training.checkpoints import by_path
from experiments.training.program import averaged_network
from experiments.training.restore import restore


def export(folder: Path, out: Path | None = None, step: int | None = None, average: bool = False) -> Path:
    """Write the parameters of a run, and BatchNorm's statistics, as a safetensors file.

    Args:
      folder: The folder of the run.
      out: The file; FOLDER/params.safetensors by default.
      step: The step of the checkpoint; the last by default.
      average: Write the averaged weights.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise ImportError("Export needs safetensors: pip install safetensors.") from error
    restored = restore(folder, step, Run(devices=1))
    state, out = restored.state, out or folder / "params.safetensors"
    if average:
        params, model_state = averaged_network(state, restored.program, restored.inputs)
    else:
        params, model_state = state.params, state.model_state
    leaves = by_path(params) | by_path(model_state)
    arrays = {path.removesuffix("/value"): np.asarray(leaf) for path, leaf in leaves.items()}  # without nnx's box
    recipe = restored.recipe
    note = {"model": recipe.model, "dataset": recipe.dataset, "method": recipe.method, "step": str(int(state.step))}
    files.replace(out, save(arrays, note))
    print(f"{len(arrays)} arrays of {folder}, step {note['step']}, are in {out}.")
    return out
