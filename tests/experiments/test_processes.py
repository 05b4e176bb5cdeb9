"""Several real processes of one run, on loopback: what ends one of them ends all, in seconds and in one line each."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tensorboardX", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.settings.configs import Run
from experiments.training import supervisor
from experiments.training.restore import restore
from experiments.training.run_folder import locked, steps_of

ROOT = Path(__file__).parents[2]
LONG, SHORT = "100000", "3"

pytestmark = pytest.mark.slow


class Group:
    """Several processes of one run; each is the one that watches, with a child that trains."""

    def __init__(self, count, folder, cache_folder, epochs=LONG, **options):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache_folder)}
        command = [sys.executable, "-m", "experiments", "train", "digits-convnet", "--method", "sam"]
        command += ["--epochs", epochs, "--batch-size", "100", "--schedule", "constant", "--log-steps", "1"]
        command += ["--model-options.width", "4", "--probe-examples", "0", "--out", str(folder)]
        self.folder = folder
        self.processes, ranks = [], options.pop("ranks", range(count))
        for index in range(count):
            several = ["--distributed", "--coordinator", coordinator, "--num-processes", str(count)]
            several += ["--process-id", str(index)]
            own = options if index in ranks else {}
            self.processes.append(
                subprocess.Popen(
                    [*command, *(several if count > 1 else ["--devices", "1"])], cwd=ROOT, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, **own,
                )
            )  # fmt: skip

    def wait_for_step(self, step, seconds=240):
        end, file = time.monotonic() + seconds, self.folder / "steps.jsonl"
        while time.monotonic() < end:
            if file.exists() and len(file.read_text().splitlines()) > step:
                return
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        raise AssertionError("it did not train")

    def child(self, index):
        """The process that trains."""
        pid = self.processes[index].pid
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def ends(self, seconds):
        """Statuses and lines of stderr of all, which have to end within so many seconds."""
        start = time.monotonic()
        outputs = [process.communicate(timeout=240) for process in self.processes]
        took = time.monotonic() - start
        assert took < seconds, outputs
        return [p.returncode for p in self.processes], [err.splitlines() for _, err in outputs]

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def group(tmp_path, cache_folder):
    groups = []

    def start(count, **options):
        groups.append(Group(count, tmp_path / "run", cache_folder, **options))
        return groups[-1]

    yield start
    for one in groups:
        one.close()


@pytest.mark.parametrize(
    ("killed", "count"),
    [("first", 2), ("last", 2), ("watcher of the first", 2), ("watcher of the last", 2), ("last", 4)],
)
def test_a_killed_process_ends_all_with_the_step_to_resume_from(killed, count, group):
    run = group(count)
    run.wait_for_step(25)
    rank = 0 if "first" in killed else count - 1
    os.kill(run.processes[rank].pid if "watcher" in killed else run.child(rank), signal.SIGKILL)
    statuses, lines = run.ends(seconds=12)
    last = steps_of(run.folder)[-1]
    for index, (status, said) in enumerate(zip(statuses, lines, strict=True)):
        if index == rank and "watcher" in killed:
            continue
        assert status == 1
        assert len(said) == 1, said
        assert f"process {rank} was" in said[0]
        assert f"resumes from step {last}" in said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_falls_silent_ends_the_others(rank, group):
    """As without power or network: its connections stay open, and nothing comes through them."""
    run = group(2)
    run.wait_for_step(25)
    silent = [run.processes[rank].pid, run.child(rank)]
    for pid in silent:
        os.kill(pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        _, error = run.processes[1 - rank].communicate(timeout=120)
        took = time.monotonic() - start
    finally:
        for pid in silent:
            os.kill(pid, signal.SIGKILL)
    assert run.processes[1 - rank].returncode == 1
    [line] = error.splitlines()
    assert line.startswith(f"error: process {rank} was killed, or its host cannot be reached.")
    assert f"resumes from step {steps_of(run.folder)[-1]}" in line
    assert 7 < took < 30
    run.processes[rank].wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_either_saves_all(rank, group):
    run = group(2)
    run.wait_for_step(15)
    run.processes[rank].send_signal(signal.SIGTERM)
    statuses, lines = run.ends(seconds=60)
    assert statuses == [143, 143], lines
    step = steps_of(run.folder)[-1]
    assert step >= 15
    assert json.loads((run.folder / "steps.jsonl").read_text().splitlines()[-1])["step"] == step


def test_a_folder_that_is_locked_ends_all(group, tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        run = group(2)
        start = time.monotonic()
        statuses, lines = run.ends(seconds=120)
    assert time.monotonic() - start < 120
    assert statuses == [1, 1]
    folder = tmp_path / "run"
    assert lines[0] == [f"error: Another process is writing to {folder}."]
    assert len(lines[1]) == 1
    assert lines[1][0].startswith(f"error: process 0 ended: Another process is writing to {folder}")


def test_a_full_disk_ends_all(group):
    """The limit on the size of files stands for it; the first process alone has it."""
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    run = group(2, ranks=[0], preexec_fn=full)
    statuses, lines = run.ends(seconds=240)
    assert statuses == [1, 1], lines
    assert lines[0][-1].startswith("error: ")
    assert lines[1][-1].startswith("error: process 0 ended: ")
    assert not any("Traceback" in line or "0x" in line for said in lines for line in said), lines


def test_two_processes_resume_what_one_began_and_the_reverse(group):
    for count, epochs in ((1, "1"), (2, "2"), (4, "3"), (1, "4")):
        run = group(count, epochs=epochs)
        statuses, lines = run.ends(seconds=240)
        assert statuses == [0] * count, lines
        assert steps_of(run.folder)[-1] == 10 * int(epochs)
    notes = [json.loads(line) for line in (run.folder / "environment.jsonl").read_text().splitlines()]
    assert [note["processes"] for note in notes] == [1, 2, 4, 1]
    state = restore(run.folder, run=Run(devices=1)).state
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("error", "waits"),
    [(RuntimeError("x"), True), (ValueError("UNKNOWN: Gloo AllGather failed"), True), (ValueError("x"), False)],
)
def test_a_failed_connection_waits_for_the_news_of_its_cause(monkeypatch, error, waits):
    slept = []
    monkeypatch.setattr(supervisor.time, "sleep", slept.append)
    supervisor.wait_for_peers_news(error)
    assert not slept  # where nothing watches
    monkeypatch.setattr(supervisor, "is_supervised", lambda: True)
    supervisor.wait_for_peers_news(error)
    assert bool(slept) == waits
