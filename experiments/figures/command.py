"""One command a figure: measure what is missing, then draw."""

from pathlib import Path

from experiments import ranges, tables
from experiments.figures.curvature_plots import figure_1, figure_2
from experiments.figures.measures import Curvature, Ratio
from experiments.figures.missing import CURVATURE, RATIO, SURFACE, measure_all
from experiments.figures.settings import Figures, What
from experiments.figures.surface_plots import figure_4, interactive
from experiments.figures.surfaces import SurfacePoint
from experiments.figures.table import table_3
from experiments.figures.trained import find_runs
from experiments.figures.training_plots import figure_5

_NEEDS_CURVATURE = ("all", "figure1", "figure2", "table3")
_NEEDS_SURFACE = ("all", "figure4", "html")


def figures(what: What, folder: Path, settings: Figures = Figures(), out: Path | None = None) -> Path:  # noqa: B008
    """Measure curvature and loss surfaces of trained networks, and draw the paper's figures and table 3.

    Args:
      what: One figure, table3, html (surfaces to turn with the mouse), or all figures and the table.
      folder: Folder of the training runs, results/RECIPE.
      settings: What to measure. What was measured before is not measured again.
      out: Folder for numbers and figures; FOLDER/figures by default.

    Raises:
      FileExistsError: if ``out`` holds numbers measured with other settings.
      FileNotFoundError: if there are no runs, or an epoch's checkpoint was not kept.
      ValueError: if the runs cannot be compared.
    """
    ranges.check(settings)
    out = out or folder / "figures"
    trained = find_runs(folder)
    labels = {run.recipe.method: run.label for run in trained}
    out.mkdir(parents=True, exist_ok=True)
    if what != "figure5":
        measure_all(trained, settings, out, what in _NEEDS_CURVATURE, what in _NEEDS_SURFACE)
    curvature, ratios = tables.read(out / CURVATURE, Curvature), tables.read(out / RATIO, Ratio)
    points = tables.read(out / SURFACE, SurfacePoint)
    if what in ("all", "figure1"):
        figure_1(curvature, ratios, labels, out)
    if what in ("all", "figure2"):
        figure_2(curvature, ratios, labels, out)
    if what in ("all", "figure4"):
        figure_4(points, labels, out)
    if what in ("all", "figure5"):
        figure_5(trained, labels, out)
    if what in ("all", "table3"):
        tables.show(table_3(curvature, trained, labels, out))
    if what == "html":
        interactive(points, labels, out)
    print(f"Numbers and figures are in {out}.")
    return out
