"""Whole runs under faults: killed at random moments, or with damaged files, they end bit by bit as they would have.

``python -m pytest -m slow -s tests/experiments/test_faults.py`` tells what happened.
"""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tensorboardX", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.settings import recipes
from experiments.settings.configs import Run
from experiments.training.checkpoints import altered
from experiments.training.logs import Log, read_epochs, read_steps
from experiments.training.program import State
from experiments.training.restore import restore
from experiments.training.run_folder import steps_of
from experiments.training.train import train

RECIPE = dataclasses.replace(
    recipes.get("digits-convnet"), method="crsam", epochs=4, batch_size=100, model_options={"width": 4}
)  # fmt: skip
CUT = 25  # of 40 steps, in the third epoch
KILLS, DAMAGES = 50, 200

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled")]


def run_of(folder, **changes):
    return Run(out=folder, devices=1, log_steps=2, probe_examples=20, **changes)


def start(folder, **changes):
    """Trains, or goes on."""
    train("digits-convnet", RECIPE, run_of(folder, **changes), quiet=True)


def start_alone(folder, cache_folder):
    """The same in a process of its own, with many checkpoints."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    start(folder, checkpoint_steps=3)


def result(folder):
    """All that a run leaves, but for times: its state and its logs."""
    timeless = {"images_per_second": 0.0, "waiting_percent": 0.0, "seconds": 0.0}
    rows = [row._replace(**timeless) for row in read_epochs(folder / "metrics.csv")]
    return restore(folder, run=run_of(folder)).state, rows, read_steps(folder / "steps.jsonl")


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    assert found[1:] == expected[1:]


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    """What a run leaves that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder)
    return result(folder)


@pytest.fixture(scope="module")
def cut(whole, tmp_path_factory):
    """The folder of a run that was stopped halfway, and the states of its checkpoints."""
    folder = tmp_path_factory.mktemp("cut")
    log_step = Log.step

    def with_signal(self, step, values):
        log_step(self, step, values)
        if step == CUT - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "step", with_signal)
        with pytest.raises(SystemExit):
            start(folder)
    return folder, {step: restore(folder, step, run_of(folder)).state for step in steps_of(folder)}


def damage(folder, random_):
    """Flips a bit of a file, cuts it off, empties or deletes it, all at random; returns what was done."""
    path = random_.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind = random_.choice(["flipped", "truncated", "emptied", "deleted"])
    content = bytearray(path.read_bytes())
    if kind == "flipped" and content:
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    elif kind == "truncated" and content:
        del content[random_.randrange(len(content)) :]
    else:
        content.clear()
    path.write_bytes(content)
    if kind == "deleted":
        path.unlink()
    return kind, path.relative_to(folder)


def refused(folder, done, what):
    """What a function makes of a folder, or the error that names it."""
    try:
        return what(folder)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        if str(folder) not in str(error):
            raise AssertionError(f"{done}: {error}") from error
        return error


def test_damage_to_any_file_is_detected_or_harmless(whole, cut, tmp_path, capsys):
    """Reading gives a state as it was saved, or an error; so does going on, and its result is that of ``whole``."""
    origin, states = cut
    outcomes, random_ = Counter(), random.Random(0)
    for number in range(DAMAGES):
        folder = tmp_path / str(number)
        shutil.copytree(origin, folder)
        done = damage(folder, random_)
        capsys.readouterr()
        state = refused(folder, done, lambda folder: restore(folder, run=run_of(folder)).state)
        if isinstance(state, State):
            jax.tree.map(np.testing.assert_array_equal, state, states[int(state.step)])
        if refused(folder, done, start):
            outcomes["refused"] += 1
        else:
            outcomes["told, same result" if "is damaged" in capsys.readouterr().err else "same result"] += 1
            assert_same(result(folder), whole)
            assert not altered(folder)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{DAMAGES} damages: {dict(outcomes)}")
    assert outcomes["told, same result"] > DAMAGES / 4


def test_runs_that_are_killed_end_as_if_they_were_not(whole, compiled, tmp_path, capsys):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["experiments.training.train"])
    random_, runs, steps = random.Random(0), 0, []
    clean = run_alone(processes, tmp_path / "clean", compiled)
    kills = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        process = processes.Process(target=start_alone, args=(folder, compiled))
        process.start()
        process.join(random_.uniform(0, clean))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        steps.append(max(steps_of(folder), default=0) if folder.exists() else 0)
        if process.exitcode == 0 or kills == KILLS:
            start(folder)
            assert_same(result(folder), whole)
            runs += 1
        else:
            assert process.exitcode == -signal.SIGKILL
    with capsys.disabled():
        print(f"\n{kills} kills over {runs} runs, at the steps {steps}: all ended as the run that was not killed")
    assert len(set(steps)) > 5


def run_alone(processes, folder, cache_folder):
    """Seconds of a whole run in a process of its own, once all is compiled."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.monotonic()
        process = processes.Process(target=start_alone, args=(folder, cache_folder))
        process.start()
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - begin
    return seconds
