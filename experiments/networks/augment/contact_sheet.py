"""A picture of what each augmentation does."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.data.dataset import Dataset
from experiments.networks.augment import NAMES, augment


def draw_contact_sheet(path: str | Path, dataset: Dataset, *, names: Sequence[str] = NAMES, seed: int = 0) -> None:
    """Draws the first twelve training images, and below them what each augmentation makes of them in three tries."""
    images = jnp.asarray(dataset.train.images[:12])
    rows = [(name, trial) for name in names for trial in range(1 if name == "none" else 3)]
    figure = Figure(figsize=(len(images), 1.05 * len(rows)))
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for (name, trial), row in zip(rows, axes, strict=True):
        batch = augment(name, jax.random.key(seed + trial), images, dataset.mean, dataset.std)
        pixels = np.clip(np.asarray(batch, np.float32) * dataset.std + dataset.mean, 0, 1)
        for axis, image in zip(row, pixels, strict=True):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        if trial == 0:
            row[0].set_ylabel(name)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=100)
