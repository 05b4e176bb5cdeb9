"""Output on terminals without Unicode, and after its reader has closed it."""

import codecs
import errno
import os
import sys
from typing import Any

_IN_ASCII = {"ρ": "rho", "α": "alpha", "β": "beta", "∇": "grad ", "‖": "||", "±": "+-", "−": "-", "×": "x", "⟂": "_|_"}
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO)


def prepare() -> None:
    """Makes stdout and stderr streams that can always be written to."""
    codecs.register_error("crsam_jax.words", _in_words)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the command was started with it closed
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="crsam_jax.words")
        setattr(sys, name, Lasting(stream))


class Lasting:
    """A stream that drops what is written once nobody reads it, so that the work continues.

    Example:
      >>> import io
      >>> stream = Lasting(io.StringIO())
      >>> stream.write("text")
      4
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._is_gone = False

    def write(self, text: str) -> int:
        """Writes, unless the reader has gone."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes, unless the reader has gone."""
        self._try(self._stream.flush)

    def _try(self, act: Any) -> None:
        if self._is_gone:
            return
        try:
            act()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._is_gone = True
            self._discard()

    def _discard(self) -> None:
        """Lets the interpreter flush what is left to nowhere when it ends."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _in_words(error: UnicodeError) -> tuple[str, int]:
    """What an encoding lacks: names for the symbols of formulas, else a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(symbol, "?") for symbol in text), error.end
