"""The tutorial, which is a page of the documentation and a notebook for Colab, runs from its first cell to its last."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="executing the notebook needs pip install crsam_jax[dev]")
nbclient = pytest.importorskip("nbclient", reason="executing the notebook needs pip install crsam_jax[dev]")
pytest.importorskip("ipykernel", reason="executing the notebook needs pip install crsam_jax[dev]")
pytest.importorskip("sklearn", reason="the tutorial needs pip install crsam_jax[experiments]")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
SHORTER = {
    "EPOCHS = 100": "EPOCHS = 15",
    "SEEDS = jnp.arange(10)": "SEEDS = jnp.arange(3)",
    "RATES, RADII = (0.003, 0.01, 0.03), (0.1, 0.2, 0.4, 0.8, 1.6)": "RATES, RADII = (0.01, 0.03, 0.1), (0.1, 0.2)",
    "np.geomspace(0.001, 0.1, 15)": "np.geomspace(0.01, 0.1, 3)",
}


@pytest.mark.slow
def test_tutorial():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    source = "".join(cell.source for cell in notebook.cells)
    for old, new in SHORTER.items():
        assert old in source
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    [table] = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    accuracies = dict(re.findall(r"^\| (SGD|SAM|CR-SAM|SGD, 3× epochs) \| ([\d.]+) ±", table, re.MULTILINE))
    assert len(accuracies) == 4
    assert all(float(accuracy) > 60 for accuracy in accuracies.values())  # chance is 10 %


def test_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
