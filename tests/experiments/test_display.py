"""What a person sees: whole counts, readable tables, and no control characters where there is no terminal."""

import dataclasses
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the experiments need pip install crsam_jax[experiments]")

from rich.console import Console

from experiments.settings import recipes
from experiments.studies import jobs
from experiments.system import tables
from experiments.system.progress import Bar, track

ROOT = Path(__file__).parents[2]
TEXT = "epoch 118/200", "loss 0.123", "accuracy 99.1 %", "12345 images/s"


def frames(raw):
    """The lines that were shown one after the other, without colours and movements of the cursor."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def drawn(width, total=46_900, steps=(27_653, 46_900)):
    file = io.StringIO()
    with Bar(Console(file=file, force_terminal=True, width=width), total) as bar:
        for step in steps:
            bar.update(step, *TEXT)
            bar._progress.refresh()
    return frames(file.getvalue())


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_bar_shows_count_and_remaining_time_whole(width):
    lines = drawn(width)
    assert all(len(line) <= width for line in lines)
    assert all(re.search(r" \d+/46900 steps ETA (\d+:\d\d:\d\d|-:--:--)$", line) for line in lines)
    assert any("27653/46900 steps ETA" in line for line in lines)
    assert "46900/46900 steps ETA 0:00:00" in lines[-1]


@pytest.mark.parametrize(("width", "parts"), [(60, 1), (80, 2), (100, 4)])
def test_a_bars_text_gives_way_part_by_part(width, parts):
    assert drawn(width)[-1].startswith("  ".join(TEXT[:parts]))
    assert all(part not in drawn(width)[-1] for part in TEXT[parts:])


def test_nothing_is_left_to_do_and_no_bar_is_shown():
    file = io.StringIO()
    with Bar(Console(file=file, force_terminal=True, width=80), 40, 40) as bar:
        bar.print("complete")
    assert file.getvalue() == "complete\n"


def test_without_a_terminal_there_are_lines_alone():
    file = io.StringIO()
    with Bar(Console(file=file, width=80), 40) as bar:
        bar.update(1, *TEXT)
        bar.print("x" * 100)
        bar.update(40, *TEXT)
    assert file.getvalue() == "x" * 100 + "\n"


def test_without_a_terminal_lines_of_progress_say_how_much_time_is_left(monkeypatch):
    now = iter([0.0, 8.0, 9.0, 10.0, 10.5, 11.0, 75.0, 76.0, 77.0, 78.0])
    monkeypatch.setattr("experiments.system.progress.time.monotonic", lambda: next(now))
    file = io.StringIO()
    with Bar(Console(file=file, width=80), 40) as bar:
        bar.update(1, "epoch 1/4")  # compiled, at 8 s
        bar.update(5, "epoch 1/4")
        bar.update(11, "epoch 1/4")
        bar.print("epoch 1: loss 2", is_progress=True)  # ten steps in 2.5 s
        bar.print("a warning")
        bar.update(12, "epoch 2/4")
        bar.update(21, "epoch 2/4")  # after more than a minute without a line
        bar.update(40, "epoch 4/4")
        bar.print("epoch 4: loss 1", is_progress=True)
    assert file.getvalue().splitlines() == [
        "epoch 1: loss 2; 0:00:07 left",
        "a warning",
        "epoch 2/4  21/40 steps; 0:01:05 left",
        "epoch 4: loss 1",
    ]


def test_track_passes_all_items_on():
    assert list(track([3, 1, 2], "counting", "numbers")) == [3, 1, 2]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_wide_table_is_in_parts_that_fit(width):
    titles = ["name", "key", *(f"column {i}" for i in range(9))]
    rows = [[f"row{i}", str(i), *(f"{i}.{j} ± 0.1" for j in range(9))] for i in range(3)]
    lines = tables.fitted(tables.markdown(titles, rows).splitlines(), width, keys=2)
    assert all(len(line) <= width for line in lines)
    assert sum(line.startswith("row1  1") for line in lines) == sum(line.startswith("name  key") for line in lines) > 1
    assert all(f"{i}.{j} ± 0.1" in " ".join(lines) for i in range(3) for j in range(9))


def test_without_a_terminal_a_table_is_markdown(capsys):
    text = tables.markdown(["a", "b"], [["x", "1"]]) + "\nA caption"
    tables.show(text)
    assert capsys.readouterr().out == text + "\n"


def test_runs_are_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    result = jobs.Result("sam", 0, "", 1, 98.76)
    monkeypatch.setattr(jobs, "_carry_out", lambda name, job, run: job)
    monkeypatch.setattr(jobs, "read_result", lambda job: result)
    recipe = dataclasses.replace(recipes.get("digits"), seed=3)
    jobs.carry_out("digits", [jobs.Job("sam", recipe, tmp_path / "sam")], jobs.Run())
    assert capsys.readouterr().out == "sam, seed 3: accuracy 98.8 %\n"


def in_terminal(arguments, columns, cache_folder):
    """Frames of a command in a pseudo-terminal so many columns wide."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = environment_of(cache_folder) | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs,
        stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunks.append(os.read(ours, 1 << 16))
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    return frames(b"".join(chunks).decode())


def environment_of(cache_folder):
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache_folder)}


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80])
def test_commands_in_a_terminal(columns, tmp_path, cache_folder):
    one = ["--epochs", "1", "--model-options.width", "4", "--devices", "1"]
    train = ["train", "digits-convnet", *one, "--out", str(tmp_path / "train")]
    lines = in_terminal(train, columns, cache_folder)
    bars = [line for line in lines if "steps ETA" in line]
    assert all(len(line) <= columns for line in bars)
    assert re.search(r"epoch 1/1 .* 20/20 steps ETA 0:00:00$", bars[-1])
    lines = in_terminal(train, columns, cache_folder)
    assert lines[0] == "loading ..."
    assert "complete, 20 steps" in lines[1]
    assert not any("compiling" in line for line in lines)
    compare = ["compare", "digits", *one, "--methods", "base", "sam", "--seeds", "2", "--out", str(tmp_path / "c")]
    lines = in_terminal(compare, columns, cache_folder)
    assert re.search(r"sam, seed 1 .* 4/4 runs ETA 0:00:00$", [line for line in lines if "ETA" in line][-1])
    begin = next(number for number, line in enumerate(lines) if line.startswith("method "))
    assert all(len(line) <= columns for line in lines[begin:-1])
    assert len([line for line in lines if line.startswith("SAM ")]) == (1 if columns == 80 else 2)


@pytest.mark.slow
def test_commands_in_a_pipe(tmp_path, cache_folder):
    one = ["--epochs", "1", "--model-options.width", "4", "--devices", "1"]
    for arguments in (
        ["train", "digits-convnet", *one, "--out", str(tmp_path / "train")],
        ["compare", "digits", *one, "--methods", "base", "--seeds", "2", "--out", str(tmp_path / "compare")],
        ["list"],
        ["readiness", "digits-convnet"],
        ["benchmark", "--width", "4", "--batch-size", "8", "--rounds", "2"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "experiments", *arguments], cwd=ROOT, env=environment_of(cache_folder),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr), arguments
        assert "ETA" not in done.stdout
