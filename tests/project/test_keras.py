"""The pages about Keras run as they stand; Keras is not installed with the project, and without it this is skipped."""

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

ROOT = Path(__file__).parents[2]


def printed_by(page):
    """What the page's code prints, and what the page says that it prints."""
    text = (ROOT / "docs" / "how-to" / page).read_text()
    [source] = re.findall(r"^```python notest\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    [promised] = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a process of its own: Keras chooses its backend once
    run = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, promised


def accuracy(text):
    return float(re.search(r"test accuracy (\d\.\d\d)", text)[1])


@pytest.mark.parametrize("page", ["keras.md", "frameworks/keras_fit.md"])
def test_the_page_runs(page):
    printed, promised = printed_by(page)
    assert abs(accuracy(printed) - accuracy(promised)) < 0.03  # the last digits are the machine's
    assert printed.strip().split(", ")[1:] == promised.strip().split(", ")[1:]  # that the steps fit together is not
