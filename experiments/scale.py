"""Devices of one or several hosts as one mesh."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments.configs import Run


def start(run: Run) -> Mesh:
    """Joins the processes of a run, if there are several, and makes the mesh over their devices."""
    if run.distributed and not jax.distributed.is_initialized():
        jax.distributed.initialize(run.coordinator, run.num_processes, run.process_id)
    devices = jax.devices()
    count = run.devices or len(devices)
    if count > len(devices):
        raise ValueError(f"--devices {count}, but there are {len(devices)}: {devices}.")
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError("--devices is for one process; several use all of theirs.")
    return jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices[:count])


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
