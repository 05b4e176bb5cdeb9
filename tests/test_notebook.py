"""The quickstart runs from its first cell to its last."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="executing the notebook needs pip install crsam_jax[dev]")
nbclient = pytest.importorskip("nbclient", reason="executing the notebook needs pip install crsam_jax[dev]")
pytest.importorskip("ipykernel", reason="executing the notebook needs pip install crsam_jax[dev]")
pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "notebooks" / "quickstart.ipynb"
SHORTER = {"epochs = 10  #": "epochs = 2  #", "seeds = 2  #": "seeds = 1  #"}


@pytest.mark.slow
def test_quickstart(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    source = "".join(cell.source for cell in notebook.cells)
    settings = SHORTER | {"results/quickstart": str(tmp_path / "results")}
    for old, new in settings.items():
        assert old in source
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    [_, after] = printed.split("curvature along the gradient: ")
    assert float(after.split()[0]) == pytest.approx(1.0, abs=1e-3)  # the Hessian is the identity
    table = (tmp_path / "results" / "table.md").read_text()
    assert all(f"| {method} |" in table for method in ("SGD", "SAM", "CR-SAM"))


def test_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
