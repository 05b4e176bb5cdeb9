"""Damage that people and programs do to a run's folder: the run resumes bit by bit right, or one line says why.

Many random combinations of one or two kinds; each has to end within a time, so that nothing waits.
"""

import contextlib
import json
import os
import random
import shutil
import signal
from collections import Counter

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.system import checksums
from experiments.training.checkpoints import Checkpoints
from tests.experiments.test_checkpoints import log, resumed, run, state_of

__all__ = ["run"]  # the fixture

DAMAGES = 120


def checkpoint(folder, choice):
    found = [path for path in (folder / "checkpoints").glob("*0") if path.is_dir() and not path.is_symlink()]
    return choice.choice(sorted(found)) if found else folder / "checkpoints"


def file(folder, choice):
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return choice.choice(sorted(found))


def copied_under(name):
    def damage(folder, choice):
        target = folder / "checkpoints" / name
        if not target.exists():
            shutil.copytree(checkpoint(folder, choice), target)

    return damage


def replaced_by(make):
    def damage(folder, choice):
        path = file(folder, choice)
        path.unlink()
        make(path)

    return damage


def swap_files(folder, choice):
    """The same file of two checkpoints."""
    first, second = checkpoint(folder, choice), checkpoint(folder, choice)
    names = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    name = choice.choice(sorted(names)) if names else None
    if name and first != second and (second / name).is_file():
        a, b = (first / name).read_bytes(), (second / name).read_bytes()
        (first / name).write_bytes(b)
        (second / name).write_bytes(a)


def swap_checkpoints(folder, choice):
    first, second, aside = (folder / "checkpoints" / name for name in ("10", "30", "aside"))
    if first.is_dir() and second.is_dir():
        first.rename(aside)
        second.rename(first)
        aside.rename(second)


def resealed(folder, choice):
    """A copy under another number, sealed again by somebody who knows the format."""
    target = folder / "checkpoints" / "50"
    if not target.exists():
        shutil.copytree(checkpoint(folder, choice), target)
        checksums.seal(target)


def text_changed(change):
    def damage(folder, choice):
        path = folder / choice.choice(["config.json", "metrics.csv"])
        if path.is_file() and not path.is_symlink():
            path.write_bytes(change(path.read_bytes()))

    return damage


def touch(name):
    def damage(folder, choice):
        where = choice.choice([folder, folder / "checkpoints", checkpoint(folder, choice)])
        with contextlib.suppress(FileExistsError):
            (where / name).write_bytes(b"\x00\x01")

    return damage


def link_to_outside(folder, choice):
    path, outside = file(folder, choice), folder.parent / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def partial_in_the_way(folder, choice):
    name = choice.choice(["30.partial", "40.partial", "x.partial"])
    target = folder / "checkpoints" / name
    with contextlib.suppress(FileExistsError):
        choice.choice([lambda: target.mkdir(), lambda: os.mkfifo(target), lambda: target.write_text("x")])()


def moved_inside(folder, choice):
    """Dragged into its neighbour by accident."""
    first, second = checkpoint(folder, choice), checkpoint(folder, choice)
    if first != second:
        shutil.move(first, second / first.name)


def sums_cut(folder, choice):
    path = checkpoint(folder, choice) / checksums.NAME
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(choice.sample(lines, len(lines) - 1)))


KINDS = {
    "copied under a later number": copied_under("40"),
    "copied under a number with a zero in front": copied_under("040"),
    "copied under digits of another script": copied_under("４０"),
    "copied under a negative number": copied_under("-40"),
    "copied under a number with a space": copied_under("40 "),
    "copied by a file manager": copied_under("30 (copy)"),
    "sealed again": resealed,
    "files swapped": swap_files,
    "checkpoints swapped": swap_checkpoints,
    "a folder for a file": replaced_by(lambda path: path.mkdir()),
    "a pipe for a file": replaced_by(os.mkfifo),
    "a dangling link for a file": replaced_by(lambda path: path.symlink_to("nowhere")),
    "a link to itself for a file": replaced_by(lambda path: path.symlink_to(path.name)),
    "moved elsewhere and linked": link_to_outside,
    "line ends of Windows": text_changed(lambda text: text.replace(b"\n", b"\r\n")),
    "a mark of UTF-8": text_changed(lambda text: b"\xef\xbb\xbf" + text),
    "in UTF-16": text_changed(lambda text: text.decode(errors="replace").encode("utf-16")),
    "twice": text_changed(lambda text: text + text),
    "without its last line end": text_changed(lambda text: text.rstrip(b"\n")),
    "a null byte": text_changed(lambda text: text + b"\x00"),
    "a view of a folder": touch(".DS_Store"),
    "thumbnails": touch("Thumbs.db"),
    "a deleted file that is open": touch(".nfs00000123"),
    "a lock of an editor": touch(".#config.json"),
    "a foreign file": touch("notes.txt"),
    "unfinished": partial_in_the_way,
    "moved into another": moved_inside,
    "checksums cut": sums_cut,
    "one deleted": lambda folder, choice: shutil.rmtree(checkpoint(folder, choice)),
}


def broken_by(folder, choice):
    kinds = choice.sample(sorted(KINDS), choice.choice([1, 1, 2]))
    for kind in kinds:
        with contextlib.suppress(FileNotFoundError, IndexError, OSError):
            KINDS[kind](folder, choice)
    return kinds


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "SHA256SUMS", "arrays/manifest.ocdbt"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_checkpoint_with_a_folder_or_a_pipe_for_a_file_is_not_taken(name, make, run):
    path = run / "checkpoints" / "30" / name
    path.unlink()
    make(path)
    assert assert_right_or_told(run, [name]) == "right"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind, run):
    KINDS[kind](run, random.Random(0))
    assert assert_right_or_told(run, [kind]) == "right"


def test_random_damages(run, tmp_path_factory, capsys):
    found = Counter()
    for seed in range(DAMAGES):
        folder = tmp_path_factory.mktemp("damaged") / "run"
        shutil.copytree(run, folder)
        kinds = broken_by(folder, random.Random(seed))
        found[assert_right_or_told(folder, kinds)] += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{DAMAGES} damages: {dict(found)}")
    assert found["right"] > DAMAGES / 2


def assert_right_or_told(folder, kinds):
    """As ``train`` does: the configuration is written anew, what is in the way renamed, then the run resumes."""
    from experiments.training import run_folder
    from experiments.training.train import clear_way

    signal.alarm(60)
    try:
        clear_way(folder)
        run_folder.save_json({"epochs": 4, "seed": 1}, folder / "config.json")
        state, position = resumed(folder)
    except (FileExistsError, ValueError) as error:
        if len(str(error).splitlines()) != 1:
            raise
        return "told"
    finally:
        signal.alarm(0)
    step = int(state.step)
    assert step in (0, 10, 20, 30), kinds
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert position == ({"at": step} if step else None), kinds
    if step:
        log(folder.parent, step)
        assert (folder / "metrics.csv").read_bytes() == (folder.parent / "metrics.csv").read_bytes(), kinds
    with contextlib.closing(Checkpoints(folder)) as checkpoints:  # and it goes on from there
        log(folder, step + 10)
        checkpoints.save(state_of(step + 10), {"at": step + 10})
        checkpoints.wait()
        assert json.loads((checkpoints.path(step + 10) / "position.json").read_text()) == {"at": step + 10}
    return "right"
