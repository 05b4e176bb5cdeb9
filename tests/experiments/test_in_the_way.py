"""Things in a run's folder that do not belong there: told once, stepped around, never waited for or written through."""

import contextlib
import os
import signal
from typing import NamedTuple

import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.system import checksums, files, tables
from experiments.training import run_folder
from experiments.training.checkpoints import Checkpoints, altered
from experiments.training.run_folder import steps_of
from experiments.training.train import clear_way
from tests.experiments.test_checkpoints import assert_is, contents, resumed, run, state_of

__all__ = ["run"]  # the fixture


@pytest.fixture(autouse=True)
def _nothing_blocks():
    signal.alarm(60)
    yield
    signal.alarm(0)


class Row(NamedTuple):
    epoch: int


SYSTEM = [".DS_Store", "Thumbs.db", "desktop.ini", ".nfs000000000001a2b3", "._params"]


@pytest.mark.parametrize("name", SYSTEM)
def test_files_of_operating_systems_damage_nothing(name, run):
    for folder in (run, run / "checkpoints", run / "checkpoints" / "30", run / "checkpoints" / "30" / "arrays"):
        (folder / name).write_text("view")
    assert checksums.fault(run / "checkpoints" / "30") is None
    assert_is(resumed(run), 30)


def test_a_foreign_file_is_still_damage(run):
    (run / "checkpoints" / "30" / "notes.txt").write_text("mine")
    assert "notes.txt" in checksums.fault(run / "checkpoints" / "30")


def test_an_empty_folder_with_a_view_is_free(tmp_path):
    from experiments.settings import recipes

    (tmp_path / ".DS_Store").write_text("view")
    run_folder.check_free(recipes.get("digits"), tmp_path)


def test_a_file_in_the_place_of_a_checkpoint_or_of_all(run, capsys):
    (run / "checkpoints" / "40").write_text("mine")
    (run / "checkpoints" / "20.partial").write_text("mine")
    assert steps_of(run) == [10, 20, 30]
    assert_is(resumed(run), 30)
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(state_of(40), {"at": 40})
    assert (run / "checkpoints" / "40.aside").read_text() == "mine"
    assert "40 was a file where a folder belongs. It is now 40.aside." in capsys.readouterr().err
    assert_is(resumed(run), 40)


def test_things_of_the_wrong_kind_are_renamed_once(tmp_path, capsys):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "metrics.csv").mkdir()
    os.mkfifo(tmp_path / "steps.jsonl")
    (tmp_path / "environment.jsonl").symlink_to(target)
    (tmp_path / "checkpoints").write_text("a file")
    (tmp_path / "config.json").write_text("{}")
    clear_way(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert any("a named pipe where a file belongs" in line for line in said)
    assert any("a symbolic link where a file belongs" in line for line in said)
    clear_way(tmp_path)
    assert capsys.readouterr().err == ""
    assert target.read_text() == "precious"
    assert (tmp_path / "config.json").exists()


def test_damage_of_the_wrong_kind_is_found_without_waiting(run):
    (run / "checkpoints" / "30" / "SHA256SUMS").unlink()
    os.mkfifo(run / "checkpoints" / "30" / "SHA256SUMS")
    (run / "metrics.csv").unlink()
    os.mkfifo(run / "metrics.csv")
    assert "named pipe" in checksums.fault(run / "checkpoints" / "30")
    assert altered(run, 20) == [run / "metrics.csv"]
    with pytest.raises(ValueError, match="named pipe"):
        tables.read(run / "metrics.csv", tuple)
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    with pytest.raises(ValueError, match="named pipe"):
        files.read_json(run / "config.json")


@pytest.mark.parametrize("name", ["lock", "config.json.partial", "metrics.csv.partial", "metrics.csv"])
def test_nothing_is_written_through_a_symbolic_link(name, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    target = tmp_path / "target"
    target.write_text("precious\n")
    (folder / name).symlink_to(target)
    if name == "lock":
        with pytest.raises(FileExistsError, match="symbolic link"), run_folder.locked(folder):
            pass
    elif name == "metrics.csv":
        with pytest.raises(FileExistsError, match="symbolic link"):
            tables.append(folder / name, [Row(1)])
    else:
        files.replace(folder / name.removesuffix(".partial"), "new")
        assert (folder / name.removesuffix(".partial")).read_text() == "new"
    assert contents(tmp_path)[target.relative_to(tmp_path)] == b"precious\n"
