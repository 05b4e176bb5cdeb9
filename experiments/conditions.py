"""What decides the last bits of a result, noted at each start of a run, and what of it has changed since."""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import files

_DECIDING = ("versions", "devices", "processes", "cores", "flags")


def note(folder: Path, mesh: Mesh) -> None:
    """Adds a line to environment.jsonl: software, devices, cores, flags and the command."""
    line = json.dumps(_now(mesh) | {"command": sys.argv}) + "\n"
    with files.opened(folder / "environment.jsonl") as file:
        file.write(line.encode())


def changed(folder: Path, mesh: Mesh) -> str:
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
