"""A step stays small: counts of files, equations and instructions, held to the documented size."""

import re
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.costs import size

# The most files and equations, and the most instructions as a multiple of those of optax's SAM, which has 220. SAM has
# 228 and CR-SAM 353 with jax 0.10.2; 232 and 359 with jax 0.12.
LIMITS = {"sam": (6, 1300, 1.06), "crsam": (6, 2000, 1.65)}


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_is_small(name):
    files, equations, ratio = LIMITS[name]
    found, reference = size.size(size.PROGRAMS[name]), size.size(size.PROGRAMS["optax.contrib.sam"])
    assert found["files"] <= files
    assert found["equations"] <= equations
    assert found["instructions"] <= ratio * reference["instructions"]


def test_the_documented_equations_are_those_that_are_counted():
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "cost.md").read_text()
    for name in LIMITS:
        row = re.search(rf"^\| {name} \| (\d+) \| \d+ \| ([\d,]+) \|", page, re.MULTILINE)
        found = size.size(size.PROGRAMS[name])
        assert (found["files"], found["equations"]) == pytest.approx(
            (int(row[1]), int(row[2].replace(",", ""))), rel=0.1
        )
