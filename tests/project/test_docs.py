"""The documentation has all there is to find, and its links from the README lead somewhere."""

import re
from pathlib import Path

import pytest

import crsam_jax
from crsam_jax import landscape

ROOT = Path(__file__).parents[2]
REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))


@pytest.mark.parametrize("module", [crsam_jax, landscape], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    missing = [name for name in module.__all__ if f":: {module.__name__}.{name}" not in REFERENCE]
    assert not missing, f"docs/reference lacks {missing}"


def test_the_reference_has_every_measure():
    curvature = pytest.importorskip("crsam_jax.curvature", reason="needs pip install crsam_jax[curvature]")
    missing = [name for name in curvature.__all__ if f":: crsam_jax.curvature.{name}" not in REFERENCE]
    assert not missing, f"docs/reference lacks {missing}"


def test_the_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(targets) > 20
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_results_are_apart_from_the_pages():
    results = [path.name for path in (ROOT / "docs").rglob("*.*") if path.suffix in (".csv", ".json", ".png")]
    assert not results, f"{results} belong in results/published"
    shown = [
        path.parent / target
        for path in (ROOT / "docs").rglob("*.md")
        for target in re.findall(r"\]\(([./]*results/published/[^)]+)\)", path.read_text())
    ]
    assert len(shown) > 20
    assert not [str(path) for path in shown if not path.is_file()]


def test_the_commands_of_pages_name_published_results_that_are_there():
    named = {
        name
        for path in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"(?<![./\w])results/published/[\w./-]*\w", path.read_text())
    }
    assert len(named) > 20
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing <= {"results/published/accelerators/measured.csv"}  # no device has run the command yet


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 120


def test_no_placeholder_is_left():
    """A word in capitals alone on a line was to be replaced by what a command prints."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "results/published").rglob("*.md")]
    left = [page.name for page in pages for line in page.read_text().splitlines() if re.fullmatch("[A-Z_]{4,}", line)]
    assert not left


def test_the_rooms_of_the_experiments_are_where_the_guide_says():
    guide = (ROOT / "docs" / "experiments.md").read_text().partition("## Where things are")[2]
    named = re.findall(r"`([\w/]+(?:/|\.py))`", guide)
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / "experiments" / name.removeprefix("experiments/")).exists()]
