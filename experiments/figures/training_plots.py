"""Figure 5: loss and accuracy over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.figures import style
from experiments.figures.trained import Trained

_PANELS = (
    ("train_loss", "training loss"),
    ("test_loss", "test loss"),
    ("train_accuracy", "training accuracy, %"),
    ("test_accuracy", "test accuracy, %"),
)


def figure_5(trained: Sequence[Trained], labels: Mapping[str, str], out: Path) -> None:
    """Loss and accuracy on training batches, as trained on, and on the test set; both losses on one scale.

    Args:
      trained: the runs with their metrics.
      labels: of the methods, in the order to draw.
      out: folder for figure5.png and figure5.svg.
    """
    with plt.rc_context(style.SETTINGS):
        figure, axes = plt.subplots(2, 2, figsize=(style.WIDTH, 4.2), layout="constrained", sharex=True)
        for axis, (field, name) in zip(axes.flat, _PANELS, strict=True):
            for method, label in labels.items():
                runs = [run.metrics for run in trained if run.recipe.method == method]
                epochs = [row.epoch for row in min(runs, key=len)]  # of all seeds, if one is still training
                values = [[getattr(run[i], field) for run in runs] for i in range(len(epochs))]
                style.band(axis, epochs, values, label=label, **style.look(method, list(labels)))
            axis.set_ylabel(name)
        for axis in axes[0]:
            axis.set_ylim(0, max(a.get_ylim()[1] for a in axes[0]))
        axes[1, 0].set_ylim(0, 100)
        figure.align_ylabels(axes)
        for axis in axes[1]:
            axis.set_xlabel("epoch")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(labels))
        style.save(figure, out, "figure5")
