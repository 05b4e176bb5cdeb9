"""Which process gets which signal: Ctrl-C and a closed terminal (SIGHUP) reach all of them; and SIGTERM."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

_STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Delays them in this process, and blocks them in processes started meanwhile."""
    resource_tracker.ensure_running()  # which else the first of these processes starts, and then lets Ctrl-C through
    with _masked(signal.SIG_BLOCK):
        yield


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt, and the others, passed on to the started processes as SIGTERM, a SystemExit."""

    def terminate(number: int, frame: object) -> None:
        for process in multiprocessing.active_children():
            process.terminate()
        raise SystemExit(128 + number)

    with _handled(signal.default_int_handler, terminate, terminate):
        yield


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collects the first of them in a list, or one that was held back before; the second acts as usual.

    What comes within a second of the first is the same one, sent to this process and passed on to it.
    """
    found: list[int] = []
    heard = 0.0

    def catch(number: int, frame: object) -> None:
        nonlocal heard
        if not found:
            found.append(number)
            heard = time.monotonic()
        elif time.monotonic() - heard > 1:
            restore()
            signal.raise_signal(number)

    with _handled(catch, catch, catch) as restore, _masked(signal.SIG_UNBLOCK):
        yield found


@contextlib.contextmanager
def _handled(*handlers: Any) -> Iterator[Callable[[], None]]:
    """Has the signals handled by these, until the end or a call of what it gives; what nohup ignores stays ignored."""
    heard = [kind for kind in _STOPPING if kind != signal.SIGHUP or signal.getsignal(kind) != signal.SIG_IGN]
    before = {kind: signal.signal(kind, handlers[_STOPPING.index(kind)]) for kind in heard}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    try:
        yield restore
    finally:
        restore()


@contextlib.contextmanager
def _masked(how: int) -> Iterator[None]:
    mask = signal.pthread_sigmask(how, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
