"""Ctrl-C, which reaches all processes of a terminal at once: who hears it when."""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keeps Ctrl-C for later, here, and for good in processes that are started meanwhile."""
    resource_tracker.ensure_running()  # which else the first of these processes starts, and then lets Ctrl-C through
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
