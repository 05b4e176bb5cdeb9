"""Silences what libraries print in addition to the error that they raise."""

import logging
import sys
import warnings


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
    sys.excepthook = lambda kind, error, traceback: (
        None if _is_told(error) else sys.__excepthook__(kind, error, traceback)
    )
    sys.unraisablehook = lambda raised: None if _is_told(raised.exc_value) else sys.__unraisablehook__(raised)


def _is_told(error: BaseException | None) -> bool:
    return str(error) == "Event loop is closed"  # by the first error, so that all others find it closed
