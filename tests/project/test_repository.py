"""The files around the code: what GitHub runs are targets of the Makefile, on the Pythons that the package states."""

import configparser
import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
TARGETS = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)


def commands(job):
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job["steps"]:
        for target in matrix.get("target", [""]):
            yield step.get("run", "").replace("${{ matrix.target }}", target)


def test_the_workflow_runs_what_ci_runs():
    found = {line.split()[1] for job in WORKFLOW["jobs"].values() for line in commands(job) if line}
    assert found <= set(TARGETS)
    assert found == set(re.findall(r"^make ([a-z-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE))


def test_the_workflow_has_the_pythons_of_the_package():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    stated = re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"])
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == stated


def test_the_guide_for_contributors_names_what_there_is():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"make ((?:test|lint)[a-z-]*)", text)) <= set(TARGETS)
    paths = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`((?:tests|docs|experiments|crsam_jax)/[\w./]*)`", text)
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", [".pre-commit-config.yaml", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
)])  # fmt: skip
def test_other_files_for_services_are_yaml(path):
    assert isinstance(yaml.safe_load((ROOT / path).read_text()), dict)
