"""Scalars as events for TensorBoard, written where they are added: an error of the disk reaches who adds them."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import Summary


class Events:
    """A file of events in a folder.

    Args:
      folder: of the run.
      first_step: what earlier files have of this step and later ones does not count.
    """

    def __init__(self, folder: Path, first_step: int):
        self._writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars by their tags."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
