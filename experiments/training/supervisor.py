"""One of several processes of a run, watched: whatever ends it ends the others too, within seconds and in one line.

A process that fails, or is killed, leaves its peers inside a collective operation, where nothing reaches them and the
libraries give up after minutes with a stack of C++. So ``--distributed`` starts the training in a process of its own.
The one that started it, which never waits for a device, keeps a connection to the process that watches rank 0, and
learns there who has ended and why.
"""

import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_MARK = "CRSAM_JAX_SUPERVISED"
_BEAT, _SILENCE = 1.0, 8.0  # seconds: between two signs of life, and without any until a peer is given up
_FORWARDED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
_GONE = "was killed, or its host cannot be reached"

# What XLA, Gloo and the coordination service print to stderr, and stacks.
_NATIVE = re.compile(
    r"^([WEIF]\d{4} |\[Gloo\]|WARNING: All log|\*\*\* |\s+@ +0x|Additional GRPC|:UNKNOWN:|terminate called)"
)


def is_supervised() -> bool:
    """Whether this process trains, and another one watches it."""
    return _MARK in os.environ


def follow_parent() -> None:
    """Ends this process with the one that watches it, on Linux."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def tell(**facts: Any) -> None:
    """Tells the watching process what it has to know: rank, number of processes, address of rank 0, folder."""
    if is_supervised():
        os.write(int(os.environ[_MARK].split(",")[0]), (json.dumps(facts) + "\n").encode())


def port() -> int:
    """The port on which the watching process listens, if this is rank 0."""
    return int(os.environ[_MARK].split(",")[1]) if is_supervised() else 0


def wait_for_peers_news(error: Exception) -> None:
    """Gives the watching process time to learn that a peer is gone, and to end this one, before it shows an error.

    Where a peer is missing, a collective operation fails: in jax a RuntimeError, or a ValueError that names Gloo.
    """
    if is_supervised() and (isinstance(error, RuntimeError) or "Gloo" in str(error)):
        time.sleep(_SILENCE + 1)


def supervise(arguments: Sequence[str]) -> int:
    """Runs ``python -m experiments`` with the arguments in a process of its own; the status to exit with."""
    return _Supervisor(arguments).run()


class _Supervisor:
    def __init__(self, arguments: Sequence[str]):
        self._listener = (
            socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            if (socket.has_dualstack_ipv6())
            else socket.create_server(("", 0))
        )
        self._told, write_end = os.pipe()
        environment = os.environ | {_MARK: f"{write_end},{self._listener.getsockname()[1]}"}
        # The child finds this package even if it lies inside another one in site-packages.
        paths = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "experiments", *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            pass_fds=[write_end],
            text=True,
            errors="replace",
        )
        os.close(write_end)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._told, selectors.EVENT_READ, b"")
        self._peers: dict[socket.socket, dict[str, Any]] = {}
        self._rank: int | None = None
        self._folder: Path | None = None
        self._native: deque[str] = deque(maxlen=100)
        self._error = ""
        self._next_beat = 0.0
        self._reader = threading.Thread(target=self._forward, daemon=True)

    def run(self) -> int:
        self._reader.start()
        with self._signals():
            while (status := self._child.poll()) is None:
                if ended := self._watch():
                    return self._end_because_of(*ended)
            # The libraries end a process whose peer is gone: its own watcher may know more in a moment.
            until = time.monotonic() + (_SILENCE + 1 if status == -signal.SIGABRT else 0)
            while self._peers and time.monotonic() < until:
                if ended := self._watch():
                    return self._end_because_of(*ended)
        return self._end(status)

    def _watch(self) -> tuple[int, str] | None:
        """One round: the rank of a process that has ended, and why, if there is one."""
        ended = None
        for key, _ in self._selector.select(timeout=0.25):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                self._add(connection)
            elif key.fileobj == self._told:
                self._hear_child()
            else:
                ended = self._hear_peer(key.fileobj) or ended  # type: ignore[arg-type]
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + _BEAT
            self._send({"beat": self._rank})
        for peer in self._peers.values():
            if now - peer["heard"] > _SILENCE and not peer["is_done"] and peer["rank"] is not None:
                ended = ended or (peer["rank"], _GONE)
        return ended

    def _hear_child(self) -> None:
        key = self._selector.get_key(self._told)
        data = os.read(self._told, 65536)
        if not data:
            self._selector.unregister(self._told)
            return
        *lines, rest = (key.data + data).split(b"\n")
        self._selector.modify(self._told, selectors.EVENT_READ, rest)
        for facts in map(json.loads, lines):
            if "folder" in facts:
                self._folder = Path(facts["folder"])
            if "rank" in facts:
                self._rank = facts["rank"]
                if self._rank == 0:
                    self._selector.register(self._listener, selectors.EVENT_READ)
                else:
                    self._connect(facts["host"], facts["port"])

    def _connect(self, host: str, port: int) -> None:
        """Connects to the watcher of rank 0; if the connection fails, the run continues without a watch."""
        try:
            self._add(socket.create_connection((host, port), timeout=5), rank=0)
        except OSError as error:
            reason = error.strerror or error
            print(f"No connection to {host}, port {port} ({reason}): peers that die are noticed late.", file=sys.stderr)

    def _add(self, connection: socket.socket, rank: int | None = None) -> None:
        connection.settimeout(2)
        self._peers[connection] = {"rank": rank, "heard": time.monotonic(), "is_done": False, "rest": b""}
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear_peer(self, connection: socket.socket) -> tuple[int, str] | None:
        peer = self._peers[connection]
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        peer["heard"] = time.monotonic()
        if not data:
            self._selector.unregister(connection)
            del self._peers[connection]
            return None if peer["is_done"] or peer["rank"] is None else (peer["rank"], _GONE)
        *lines, peer["rest"] = (peer["rest"] + data).split(b"\n")
        for line in lines:
            message = _read(line)
            if "beat" in message and peer["rank"] is None:
                peer["rank"] = message["beat"]
            if "done" in message:
                peer["is_done"] = True
            if "ended" in message:
                return message["ended"], message.get("why", _GONE)
        return None

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._peers:
            with contextlib.suppress(OSError):
                connection.sendall((json.dumps(message) + "\n").encode())

    def _end_because_of(self, rank: int, why: str) -> int:
        """Ends because another process has ended."""
        self._child.kill()
        self._child.wait()
        self._send({"ended": rank, "why": why})
        print(f"error: process {rank} {why}. {self._resumption()}", file=sys.stderr)
        return 1

    def _end(self, status: int) -> int:
        """Ends because the process that trains has ended."""
        self._reader.join(timeout=5)
        if status == 0 or status - 128 in _FORWARDED:  # complete, or saved at a signal
            self._send({"done": self._rank})
            return status
        if status > 0:
            self._send({"ended": self._rank, "why": f"ended: {self._error or f'status {status}'}"})
            return status
        name = signal.Signals(-status).name
        for line in self._native:
            print(line, file=sys.stderr)
        self._send({"ended": self._rank, "why": f"was ended by {name}"})
        print(f"error: process {self._rank or 0} was ended by {name}. {self._resumption()}", file=sys.stderr)
        return 1

    def _resumption(self) -> str:
        from experiments.training.run_folder import steps_of

        steps = steps_of(self._folder) if self._folder else []
        start = f"from step {steps[-1]}" if steps else "from the start, as there is no checkpoint"
        return f"The same command on all hosts resumes {start}."

    def _forward(self) -> None:
        """Passes on what the process writes to stderr; what its libraries write is kept in case it crashes."""
        assert self._child.stderr is not None
        for line in self._child.stderr:
            line = line.rstrip("\n")
            if _NATIVE.match(line):
                self._native.append(line)
                continue
            if line.startswith("error: "):
                self._error = line.removeprefix("error: ")
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Passes signals on to the process that trains, which saves."""
        forward = lambda number, frame: self._child.send_signal(number)
        before = {kind: signal.signal(kind, forward) for kind in _FORWARDED if signal.getsignal(kind) != signal.SIG_IGN}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def _read(line: bytes) -> dict[str, Any]:
    """A message of a peer; empty if whoever wrote it is none."""
    try:
        message = json.loads(line)
    except (RecursionError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
