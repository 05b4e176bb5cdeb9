"""Ctrl-C, which reaches all processes of a terminal at once, and SIGTERM, which may reach one: who hears it when."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keeps both for later, here, and for good in processes that are started meanwhile."""
    resource_tracker.ensure_running()  # which else the first of these processes starts, and then lets Ctrl-C through
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt, and SIGTERM, which is passed on to the started processes, a SystemExit."""

    def terminate(number: int, frame: object) -> None:
        for process in multiprocessing.active_children():
            process.terminate()
        raise SystemExit(128 + number)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {kind: signal.signal(kind, handler) for kind, handler in handlers.items()}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone: nobody else would."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
