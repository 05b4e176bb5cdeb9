"""The page about Keras runs as it stands; Keras is not installed with the project, and without it this is skipped."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Not importorskip: to import Keras is to choose its backend, TensorFlow by default.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs pip install keras")
pytest.importorskip("sklearn", reason="needs pip install crsam_jax[experiments]")

ROOT = Path(__file__).parents[1]


def test_the_page_runs():
    text = (ROOT / "docs" / "how-to" / "keras.md").read_text()
    [source] = re.findall(r"^```python notest\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    [printed] = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a process of its own: Keras chooses its backend once
    run = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # The accuracy is the machine's, to a point; that the steps fit together is not.
    assert run.stdout.split(", ")[1] == printed.split(", ")[1]
