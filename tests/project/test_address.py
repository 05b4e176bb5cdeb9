"""The repository's address stands in setup.cfg, and is the same where it is needed too."""

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("setup.cfg", "Makefile", ".ci/address", "CITATION.cff", "docs/tutorial.ipynb", "README.md", "docs/index.md")


def addresses(root):
    config = configparser.ConfigParser(interpolation=None)
    config.read(root / "setup.cfg")
    citation = re.search(r'^repository-code: "(.*)"$', (root / "CITATION.cff").read_text(), re.MULTILINE)
    cells = json.loads((root / "docs/tutorial.ipynb").read_text())["cells"]
    notebook = re.search(r'^repository = "(.*)"  # @param', "".join(cells[1]["source"]), re.MULTILINE)
    return config["metadata"].get("url", ""), citation[1] if citation else "", notebook[1]


def test_all_places_agree():
    assert len(set(addresses(ROOT))) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_owner_fills_in_one(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "setup.cfg").read_text()
    for address in ("https://example.org/a/b.git", "https://example.org/c.git", ""):
        (tmp_path / "setup.cfg").write_text(
            re.sub(r"^# url =.*$", f"url = {address}" if address else "# url =", text, flags=re.MULTILINE)
        )
        subprocess.run(["make", "address"], cwd=tmp_path, check=True)
        assert addresses(tmp_path) == (address, address, address)
    before = {name: (ROOT / name).read_text() for name in FILES[3:]}
    assert before == {name: (tmp_path / name).read_text() for name in before} or addresses(ROOT)[0]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("ending", ["", ".git"])
def test_on_github_badges_and_links_lead_there(tmp_path, ending):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "setup.cfg").read_text()
    url = f"https://github.com/someone/crsam_jax{ending}"
    (tmp_path / "setup.cfg").write_text(re.sub(r"^# url =.*$", f"url = {url}", text, flags=re.MULTILINE))
    for _ in range(2):  # twice is once
        subprocess.run(["make", "address"], cwd=tmp_path, check=True)
        for page in ("README.md", "docs/index.md"):
            text = (tmp_path / page).read_text()
            assert text.count("[![Open in Colab][badge]][colab]") == text.count("[badge]: ") == 1
            assert text.count("/github/someone/crsam_jax/blob/main/docs/tutorial.ipynb") == 1
            assert max(map(len, text.splitlines())) <= 120
        cells = json.loads((tmp_path / "docs/tutorial.ipynb").read_text())["cells"]
        links = re.findall(
            r"\]\(([^)]*)\)", "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        )
        start = "https://github.com/someone/crsam_jax/blob/main/"
        assert len(links) > 3
        assert all(link.startswith(start) and (ROOT / link.removeprefix(start)).exists() for link in links)
