"""The command line: ``python -m experiments --help``."""

import os
import signal
import sys


def main() -> int:
    """Runs one subcommand; an error that the user can mend, or an interruption, is one line and not a traceback."""
    signal.signal(signal.SIGINT, _stop_at_once)  # the imports take seconds, and nothing has begun
    from experiments import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _stop_at_once(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
