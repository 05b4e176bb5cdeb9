"""The picture of the method: losses at w and w ± ρv, and what S and D are. ``python -m experiments.figures.method``."""

import sys
from pathlib import Path

import numpy as np

DEFAULT = Path("results/published/figures/method.png")
RHO = 1.0


def loss(t: np.ndarray | float) -> np.ndarray | float:
    """A loss along v, at w + tv: a valley that is steeper to the right."""
    return 0.55 + 0.5 * t + 0.3 * t**2 + 0.06 * t**3


def draw(path: Path = DEFAULT) -> None:
    """Draws the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    minus, here, plus = (float(loss(t)) for t in (-RHO, 0.0, RHO))
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    t = np.linspace(-1.7, 1.45, 200)
    axis.plot(t, loss(t), color="0.35", linewidth=2)
    axis.plot([-RHO, RHO], [minus, plus], color="C0", linewidth=1.2, linestyle="--")
    middle = (minus + plus) / 2
    for x, y, name, label in (
        (-RHO, minus, "w − ρv", "L⁻"),
        (0.0, here, "w", "L"),
        (RHO, plus, "w + ρv", "L⁺"),
    ):
        axis.plot([x, x], [0, y], color="0.8", linewidth=1, zorder=0)
        axis.plot(x, y, "o", color="C3" if x == 0 else "C0", markersize=8)
        axis.annotate(label, (x, y), (8, -14), textcoords="offset points", fontsize=13)
        axis.annotate(name, (x, 0), (0, -8), textcoords="offset points", ha="center", va="top", fontsize=13)
    arrow = {"arrowstyle": "<->", "color": "C1", "linewidth": 1.8}
    axis.annotate("", (0, here), (0, middle), arrowprops=arrow)
    axis.annotate(
        "S/2 = (L⁺ + L⁻)/2 − L\ncurvature: S ≈ ρ² vᵀHv",
        (0, middle),
        (-10, 32),
        textcoords="offset points",
        color="C1",
        va="center",
        ha="right",
        fontsize=11,
    )
    axis.plot([-RHO, RHO + 0.3], [minus, minus], color="0.8", linewidth=1, zorder=0)
    axis.annotate("", (RHO + 0.26, minus), (RHO + 0.26, plus), arrowprops=arrow | {"color": "C2"})
    axis.annotate(
        "D = L⁺ − L⁻\nslope: D ≈ 2ρ vᵀg",
        (RHO + 0.26, (minus + plus) / 2),
        (8, 0),
        textcoords="offset points",
        color="C2",
        va="center",
        fontsize=11,
        annotation_clip=False,
    )
    axis.set(xlim=(-1.75, 2.1), ylim=(0, 1.75), xticks=[], yticks=[], ylabel="loss along v = g/‖g‖")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("SAM descends with the gradient at w + ρv; CR-SAM also lowers S and D", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:2]))
