"""Runs that lost checkpoints, got foreign ones, or resume under other conditions: told, and nothing is wiped."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal

import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tensorboardX", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.settings import recipes
from experiments.settings.configs import Run
from experiments.system import interruptions
from experiments.training import devices, run_folder
from experiments.training.checkpoints import Checkpoints
from experiments.training.logs import read_epochs
from experiments.training.restore import restore
from experiments.training.run_folder import steps_of
from experiments.training.train import train
from tests.experiments.test_checkpoints import assert_is, contents, resumed, run, state_of

__all__ = ["run"]  # the fixture

RECIPE = dataclasses.replace(recipes.get("digits-convnet"), epochs=1, batch_size=500, model_options={"width": 4})


def run_of(folder, **changes):
    return Run(**({"out": folder, "devices": 1, "log_steps": 1, "probe_examples": 0} | changes))


@pytest.fixture(scope="module")
def complete(compiled, tmp_path_factory):
    return train("digits-convnet", RECIPE, run_of(tmp_path_factory.mktemp("complete")), quiet=True)


def test_a_complete_run_without_checkpoints_is_refused_and_kept(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    with pytest.raises(FileExistsError, match="complete run of 1 epochs, but none of its checkpoints"):
        train("digits-convnet", RECIPE, run_of(folder), quiet=True)
    longer = dataclasses.replace(RECIPE, epochs=2, schedule="constant")
    with pytest.raises(FileExistsError):
        train("digits-convnet", longer, run_of(folder), quiet=True)
    assert contents(folder) == before


def test_a_run_that_lost_its_checkpoints_halfway_says_so_and_keeps_its_metrics(complete, tmp_path, capsys):
    folder = shutil.copytree(complete, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"epochs": 2}))
    metrics = (folder / "metrics.csv").read_bytes()
    train("digits-convnet", dataclasses.replace(RECIPE, epochs=2), run_of(folder), quiet=True)
    said = capsys.readouterr().err
    assert "metrics of 1 epochs but no checkpoint: it begins anew" in said
    assert (folder / "metrics.csv.before").read_bytes() == metrics
    assert [row.epoch for row in read_epochs(folder / "metrics.csv")] == [1, 2]


def test_a_checkpoint_under_another_number_is_no_checkpoint(run, capsys):
    shutil.copytree(run / "checkpoints" / "10", run / "checkpoints" / "40")
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        with pytest.raises(ValueError, match="copy of checkpoint 10"):
            checkpoints.restore(state_of(0), 40)
        assert checkpoints.newest_good()[0] == 30
    assert_is(resumed(run), 30)
    assert "Checkpoint 40 is damaged: it is a copy of checkpoint 10" in capsys.readouterr().err
    assert steps_of(run) == [10, 20, 30]


def test_a_checkpoint_of_another_run_is_set_aside(run, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other")
    (other / "config.json").write_text('{"epochs": 4, "seed": 2}')
    with contextlib.closing(Checkpoints(other)) as checkpoints:
        checkpoints.save(state_of(40), {"at": 40})
    shutil.copytree(other / "checkpoints" / "40", run / "checkpoints" / "40")
    assert_is(resumed(run), 30)
    assert "it belongs to a run with another config.json" in capsys.readouterr().err


def test_checkpoints_of_earlier_versions_are_read(run):
    from experiments.system import checksums

    folder = run / "checkpoints" / "30"
    (folder / "identity.json").unlink()
    checksums.seal(folder)
    assert_is(resumed(run), 30)


def test_other_data_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with contextlib.closing(Checkpoints(tmp_path, data={"image_shape": (8, 8, 1), "num_classes": 10})) as checkpoints:
        checkpoints.save(state_of(1), {"at": 1})
    others, said = {"image_shape": (9, 8, 1), "num_classes": 10}, r"image_shape \[8, 8, 1\], but .* has \[9, 8, 1\]"
    with (
        contextlib.closing(Checkpoints(tmp_path, data=others)) as checkpoints,
        pytest.raises(ValueError, match=said),
    ):
        checkpoints.restore(state_of(0))


def test_a_run_notes_its_data(complete):
    note = json.loads((complete / "checkpoints" / str(steps_of(complete)[-1]) / "identity.json").read_text())
    assert note == {"step": 2, "data": {"image_shape": [8, 8, 1], "num_classes": 10}}
    assert int(restore(complete, run=run_of(complete)).state.step) == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_other_conditions_are_told(tmp_path, monkeypatch):
    mesh = devices.start(Run(devices=1))
    assert run_folder.changed_conditions(tmp_path, mesh) == ""
    run_folder.note_conditions(tmp_path, mesh)
    assert run_folder.changed_conditions(tmp_path, mesh) == ""
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(99)))
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    found = run_folder.changed_conditions(tmp_path, mesh)
    assert f"cores {cores} then, 99 now" in found
    assert "flags" in found
    (tmp_path / "environment.jsonl").write_text("damaged\n")
    assert run_folder.changed_conditions(tmp_path, mesh) == ""


def test_a_run_that_goes_on_elsewhere_says_that_bits_differ(complete, tmp_path, capsys):
    folder = shutil.copytree(complete, tmp_path / "run")
    longer = dataclasses.replace(RECIPE, epochs=2)
    config = json.loads((folder / "config.json").read_text())
    for path in (folder / "config.json", *folder.glob("checkpoints/*/config.json")):
        path.write_text(json.dumps(config | {"epochs": 2}))
    from experiments.system import checksums

    checksums.seal(folder / "checkpoints" / "2")
    note = json.loads((folder / "environment.jsonl").read_text())
    (folder / "environment.jsonl").write_text(json.dumps(note | {"cores": 77}) + "\n")
    train("digits-convnet", longer, run_of(folder), quiet=True)
    assert "cores 77 then" in capsys.readouterr().err
    train("digits-convnet", longer, run_of(folder), quiet=True)  # complete: nothing to say
    assert capsys.readouterr().err == ""


def test_sighup_is_collected_unless_it_is_ignored(monkeypatch):
    with interruptions.collected() as found:
        os.kill(os.getpid(), signal.SIGHUP)
        assert found == [signal.SIGHUP]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptions.collected() as found:
            os.kill(os.getpid(), signal.SIGHUP)
            assert found == []
    finally:
        signal.signal(signal.SIGHUP, before)
