"""Parameters of a run as a safetensors file, for other programs."""

from pathlib import Path

import jax
import numpy as np

from experiments import tables
from experiments.configs import Run
from experiments.program import averaged
from experiments.restore import restore


def export(folder: Path, out: Path | None = None, step: int | None = None, average: bool = False) -> Path:
    """Write the parameters of a run, and BatchNorm's statistics, as a safetensors file.

    Args:
      folder: The folder of the run.
      out: The file; FOLDER/params.safetensors by default.
      step: The step of the checkpoint; the last by default.
      average: Write the averaged weights.

    Raises:
      FileNotFoundError: if there is no such run or checkpoint.
      ImportError: if safetensors is not installed.
      OSError: if the file cannot be written.
      ValueError: if there is no average.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise ImportError("Export needs safetensors: pip install safetensors.") from error
    restored = restore(folder, step, Run(devices=1))
    state, out = restored.state, out or folder / "params.safetensors"
    networks = averaged(state) if average else (state.params, state.model_state)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): np.asarray(leaf)  # nnx's box
        for tree in networks
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    recipe = restored.recipe
    note = {"model": recipe.model, "dataset": recipe.dataset, "method": recipe.method, "step": str(int(state.step))}
    tables.replace(out, save(arrays, note))
    print(f"{len(arrays)} arrays of {folder}, step {note['step']}, are in {out}.")
    return out
