"""The tutorial, a page of the documentation and a notebook for Colab, runs alone and is stored with its outputs."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="executing the notebook needs pip install crsam_jax[dev]")
nbclient = pytest.importorskip("nbclient", reason="executing the notebook needs pip install crsam_jax[dev]")
pytest.importorskip("ipykernel", reason="executing the notebook needs pip install crsam_jax[dev]")
pytest.importorskip("sklearn", reason="the tutorial needs pip install crsam_jax[experiments]")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
SHORTER = {
    "EPOCHS = 100": "EPOCHS = 15",
    "SEEDS = jnp.arange(10)": "SEEDS = jnp.arange(3)",
    "RATES, RADII = (0.003, 0.01, 0.03), (0.1, 0.2, 0.4, 0.8, 1.6)": "RATES, RADII = (0.01, 0.03, 0.1), (0.1, 0.2)",
    "np.geomspace(0.001, 0.1, 15)": "np.geomspace(0.01, 0.1, 3)",
}


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def assert_complete(notebook):
    """Five plots, no error, and the table of the comparison with accuracies well above chance."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    [table] = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    accuracies = dict(re.findall(r"^\| (SGD|SAM|CR-SAM|SGD, 3× epochs) \| ([\d.]+) ±", table, re.MULTILINE))
    assert len(accuracies) == 4
    assert all(float(accuracy) > 60 for accuracy in accuracies.values())  # chance is 10 %


@pytest.mark.slow
def test_it_runs_alone_in_an_empty_folder(tmp_path):
    notebook = read()
    source = "".join(cell.source for cell in notebook.cells)
    for old, new in SHORTER.items():
        assert old in source
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert_complete(notebook)


def test_it_is_stored_with_its_outputs():
    assert_complete(read())
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_it_needs_the_package_alone():
    source = "\n".join(cell.source for cell in read().cells if cell.cell_type == "code")
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.MULTILINE))
    beside = {"crsam_jax", "jax", "optax", "flax", "matplotlib", "sklearn", "numpy", "scipy", "IPython"}
    assert imported <= beside | {"functools", "importlib", "pathlib"}
    assert "experiments" not in source
