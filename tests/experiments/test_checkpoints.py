"""Checkpoints under damage: what was sealed is either read as it was written, or not read."""

import contextlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.system import checksums
from experiments.training.checkpoints import Checkpoints, altered, check
from experiments.training.program import State
from experiments.training.train import resume


def state_of(step):
    """A state whose arrays depend on the step."""
    none = jnp.zeros((), jnp.int32)
    params = {"w": jnp.arange(1000.0) + step, "b": jnp.full((3, 2), step, jnp.bfloat16)}
    opt_state = optax.sgd(0.1, momentum=0.9).init(params)
    return State(
        jnp.asarray(step, jnp.int32), jnp.zeros(2, jnp.uint32), {}, params, {}, opt_state, None, jnp.zeros(()),
        jnp.zeros(()), none, none - 1,
    )  # fmt: skip


def log(folder, step):
    """What a run has written down by a step."""
    (folder / "metrics.csv").write_text("step\n" + "".join(f"{i}\n" for i in range(10, step + 1, 10)))


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was cut off at step 35, with checkpoints of the steps 10, 20 and 30."""
    (tmp_path / "config.json").write_text('{"epochs": 4, "seed": 1}')
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (10, 20, 30):
            log(tmp_path, step)
            checkpoints.save(state_of(step), {"at": step})
    log(tmp_path, 40)
    return tmp_path


def resumed(folder, like=None):
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return resume(checkpoints, state_of(0) if like is None else like)


def assert_is(found, step):
    state, position = found
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert position == ({"at": step} if step else None)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    """One bit at the end of a file."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_checksums_are_those_of_sha256sum(run):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=run / "checkpoints" / "30", capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(contents(run / "checkpoints" / "30")) - 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_to_each_file_is_found_and_named(damage, run):
    folder = run / "checkpoints" / "30"
    assert checksums.fault(folder) is None
    for path, content in contents(folder).items():
        if damage == "emptied" and not content:
            continue
        DAMAGES[damage](folder / path)
        assert str(path) in checksums.fault(folder) or path.name == checksums.NAME, path
        (folder / path).write_bytes(content)
    assert checksums.fault(folder) is None
    (folder / "more").touch()
    assert checksums.fault(folder) == "more is not what was written"


def test_a_run_goes_on_at_the_newest_checkpoint_with_its_logs(run):
    assert_is(resumed(run), 30)
    assert (run / "metrics.csv").read_text() == "step\n10\n20\n30\n"


def test_a_run_without_checkpoints_begins(tmp_path):
    assert_is(resumed(tmp_path), 0)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_counts(damage, run, capsys):
    DAMAGES[damage](largest_file(run / "checkpoints" / "30"))
    assert_is(resumed(run), 20)
    [line] = capsys.readouterr().err.splitlines()
    assert "Checkpoint 30 is damaged: arrays/" in line
    assert "30.damaged; going on from step 20: 10 steps are done again" in line
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20", "30.damaged"]
    assert (run / "metrics.csv").read_text() == "step\n10\n20\n"
    assert_is(resumed(run), 20)
    assert capsys.readouterr().err == ""


def test_several_damaged_checkpoints_are_passed_over(run, capsys):
    for step in (20, 30):
        flip(largest_file(run / "checkpoints" / str(step)))
    (run / "checkpoints" / "30.damaged").mkdir()  # of an earlier time
    assert_is(resumed(run), 10)
    assert len(capsys.readouterr().err.splitlines()) == 2
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["10", "20.damaged", "30.damaged", "30.damaged2"]


def test_a_missing_newest_checkpoint_falls_back(run):
    shutil.rmtree(run / "checkpoints" / "30")
    assert_is(resumed(run), 20)
    assert (run / "metrics.csv").read_text() == "step\n10\n20\n"


def test_if_all_are_damaged_nothing_is_changed(run):
    for step in (10, 20, 30):
        flip(largest_file(run / "checkpoints" / str(step)))
    before = contents(run)
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged \(30: .*; 20: .*; 10: .*--out"):
        resumed(run)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_runs_own_files_is_found(damage, name, run, capsys):
    log(run, 30)  # what is newer than the checkpoint is done again anyway
    DAMAGES[damage](run / name)
    assert altered(run) == [run / name]
    with pytest.raises(ValueError, match=f"{name} is damaged.*copy .*30/{name} over it"):
        check(run)
    with contextlib.closing(Checkpoints(run)) as checkpoints, pytest.raises(ValueError, match=f"{name} is damaged"):
        checkpoints.restore(state_of(0))
    if name == "config.json":  # the command that trains has written it
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            resumed(run)
        return
    assert_is(resumed(run), 30)
    assert f"{name} is damaged: it becomes what it was at checkpoint 30" in capsys.readouterr().err
    assert (run / name).read_text() == "step\n10\n20\n30\n"
    check(run)


def test_a_run_may_be_given_more_epochs(run):
    (run / "config.json").write_text('{"epochs": 9, "seed": 1}')
    check(run)
    assert_is(resumed(run), 30)
    (run / "config.json").write_text('{"epochs": 9, "seed": 2}')
    assert altered(run) == [run / "config.json"]


def test_reading_falls_back_too_but_changes_nothing(run, capsys):
    flip(largest_file(run / "checkpoints" / "30"))
    before = contents(run)
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        assert_is(checkpoints.restore(state_of(0)), 20)
        assert "Checkpoint 30 is damaged" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"Checkpoint 30 in .* is damaged: arrays/"):
            checkpoints.restore(state_of(0), 30)
        with pytest.raises(FileNotFoundError, match=r"step 7 in .*10, 20, 30"):
            checkpoints.restore(state_of(0), 7)
    assert contents(run) == before


def test_what_was_cut_off_is_no_checkpoint_and_is_cleared_away(run):
    shutil.copytree(run / "checkpoints" / "30", run / "checkpoints" / "40.partial")
    assert Checkpoints(run).steps == [10, 20, 30]
    assert_is(resumed(run), 30)
    assert not (run / "checkpoints" / "40.partial").exists()


def test_the_newest_and_those_of_the_period_are_kept(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2, keep_period=30)) as checkpoints:
        for step in range(10, 80, 10):
            checkpoints.save(state_of(step), {})
    assert checkpoints.steps == [30, 60, 70]


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_the_others(run, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "seal", full)
    checkpoints = Checkpoints(run)
    checkpoints.save(state_of(40), {})
    with pytest.raises(OSError, match=r"could not be written to .*No space left"):
        checkpoints.close()
    monkeypatch.undo()
    assert_is(resumed(run), 30)


@pytest.mark.parametrize("keep", [0, -1])
def test_to_keep_none_is_refused(keep, tmp_path):
    with pytest.raises(ValueError, match=f"keep must be at least 1, got {keep}"):
        Checkpoints(tmp_path, keep=keep)
