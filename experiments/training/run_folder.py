"""A folder per run: the resolved configuration, one writer at a time, and what decides the last bits of its result."""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.settings.recipes import Recipe
from experiments.system import files


def save_config(config: Any, folder: Path) -> None:
    """Writes the resolved configuration, a dataclass, as config.json, whole or not at all."""
    save_json(dataclasses.asdict(config), folder / "config.json")


def save_json(content: Any, path: Path) -> None:
    """Writes a file that people read too, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(content, indent=2) + "\n")


def keep_settings(settings: Any, path: Path, others: str) -> None:
    """Notes the settings of a folder's results; with other ones there, a FileExistsError says what the folder holds."""
    text = json.dumps(settings, indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise FileExistsError(f"{path.parent} holds {others}; name another folder with --out.")
    path.write_text(text)


def check_free(recipe: Recipe, folder: Path) -> None:
    """Checks that a folder is empty, or holds the run of this very recipe, or a shorter one of it that can be extended.

    Raises FileExistsError with the settings that differ, and ValueError for a damaged configuration.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder with --out.")
    if path.exists():
        saved, wanted = files.read_json(path), json.loads(json.dumps(dataclasses.asdict(recipe)))
        names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        is_longer = names == ["epochs"] and type(saved.get("epochs")) is int and saved["epochs"] < wanted["epochs"]
        if not names or (is_longer and recipe.schedule == "constant" and recipe.swa_start is None):
            return
        pairs = (f"{name} {str(saved.get(name))[:100]} there, {str(wanted.get(name))[:100]} here" for name in names)
        changes = "; ".join(pairs)[:1000]
        hint = (
            " Its learning rate falls to zero with its last epoch, and with more of them would have been another from "
            "the first step on: only runs with --schedule constant, without --swa-start, can be extended."
        ) * is_longer
        raise FileExistsError(f"{folder} holds another run ({changes}).{hint} Name another folder with --out.")
    foreign = [entry for entry in folder.iterdir() if not files.is_of_system(entry)] if folder.exists() else []
    if {entry.name for entry in foreign} - {"lock", "config.json.partial"}:
        hint = files.mended_by_copy(path) or "Name another folder with --out."
        raise FileExistsError(f"{folder} holds something that is not a run: there is no config.json. {hint}")


def steps_of(run: Path) -> list[int]:
    """The steps of all complete checkpoints of the run in a folder, ascending."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(int(name) for name in names if name == str(int(name)))  # not 040


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to the same run; the system frees the lock when the process ends."""
    with files.opened(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"Another process is writing to {folder}.") from error
        yield


_DECIDING = ("versions", "devices", "processes", "cores", "flags")


def note_conditions(folder: Path, mesh: Mesh) -> None:
    """Notes what decides the last bits of a result: software, devices, cores, flags and the command."""
    line = json.dumps(_now(mesh) | {"command": sys.argv}) + "\n"
    with files.opened(folder / "environment.jsonl") as file:
        file.write(line.encode())


def changed_conditions(folder: Path, mesh: Mesh) -> str:
    """What is not as at the last start of the run in a folder, in words; empty if nothing is."""
    before, now = _last(folder / "environment.jsonl"), _now(mesh)
    names = [name for name in _DECIDING if name in before and before[name] != now[name]]
    return ", ".join(f"{name} {_brief(before[name])} then, {_brief(now[name])} now" for name in names)


def _now(mesh: Mesh) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    flags = {name: value for name, value in os.environ.items() if name in ("XLA_FLAGS", "JAX_ENABLE_X64")}
    flags |= {name: value for name, value in os.environ.items() if name.startswith("JAX_DEFAULT_")}
    return {
        "versions": {name: version(name) for name in ("jax", "jaxlib", "optax", "flax")},
        "devices": f"{mesh.size} x {device.platform} ({device.device_kind})",
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": flags,
    }


def _last(path: Path) -> dict[str, Any]:
    """The last note; empty if there is none, or if it is damaged."""
    try:
        found = json.loads(files.read(path).decode().splitlines()[-1])
    except (FileNotFoundError, IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _brief(value: Any) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text[:100] or "none"
