"""Devices of one or several hosts as one mesh."""

import json
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments.settings.configs import Run
from experiments.training import supervisor


def start(run: Run) -> Mesh:
    """Joins the processes of a run, if there are several, and makes the mesh over their devices."""
    if run.distributed and not jax.distributed.is_initialized():
        jax.distributed.initialize(run.coordinator, run.num_processes, run.process_id)
        _introduce(run)
    devices = jax.devices()
    count = run.devices or len(devices)
    if count > len(devices):
        raise ValueError(f"--devices {count}, but there are {len(devices)}: {devices}.")
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError("--devices is for one process; several use all of theirs.")
    return jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices[:count])


def _introduce(run: Run) -> None:
    """Tells the watching process the address at which its peers meet."""
    if not supervisor.is_supervised() or jax.process_count() == 1:
        return
    host = run.coordinator.rpartition(":")[0] if run.coordinator else socket.getfqdn()
    note = np.frombuffer(json.dumps([host, supervisor.port()]).encode().ljust(512), np.uint8)
    host, port = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(note), np.uint8)))
    supervisor.tell(rank=jax.process_index(), host=host, port=port)


def decided_by_first(choice: int) -> int:
    """What the first process chose; all of them have to ask at the same point."""
    if jax.process_count() == 1:
        return choice
    return int(multihost_utils.broadcast_one_to_all(np.int32(choice)))


def wait_for_all(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(signals: list[int], is_due: bool) -> int:
    """The signal at which all processes stop, or 0; several processes tell each other where ``is_due``."""
    own = signals[0] if signals else 0
    if jax.process_count() == 1:
        return own
    return int(np.max(multihost_utils.process_allgather(np.int32(own)))) if is_due else 0
