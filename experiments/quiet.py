"""What libraries print beside the error that they raise."""

import logging
import sys
import warnings
from types import TracebackType
from typing import Any

_TOLD = "Event loop is closed"  # by the first error, so that all others find it closed


def quiet_libraries() -> None:
    """What goes wrong in a checkpoint is raised; orbax, tensorstore and asyncio print it as tracebacks besides.

    A compiled program that cannot be kept, or was cut off by a full disk, is compiled again, which needs no warning.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)  # after the first error
    # What data workers leave in shared memory is freed by a process of its own, which reads its filters from here.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    sys.excepthook, sys.unraisablehook = _show, _show_unraisable


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if str(error) != _TOLD:
        sys.__excepthook__(kind, error, traceback)


def _show_unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != _TOLD:
        sys.__unraisablehook__(unraisable)
