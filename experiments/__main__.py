"""The command line: ``python -m experiments --help``."""

import os
import signal
import sys

_TRAINING = {"train", "compare", "tune", "study", "radius", "regimes", "stronger", "sensitivity"}


def main() -> int:
    """Runs one subcommand; an error that the user can fix, or an interruption, is one line and not a traceback."""
    signal.signal(signal.SIGINT, _stop_at_once)
    from experiments.system import terminal

    terminal.prepare()
    from experiments.training import supervisor

    if {*sys.argv[1:2]} & _TRAINING and not {"-h", "--help", "--distributed"} & {*sys.argv}:
        print("loading ...", flush=True)  # the libraries take a while
    if "--distributed" in sys.argv and not supervisor.is_supervised():
        return supervisor.supervise(sys.argv[1:])
    if supervisor.is_supervised():
        supervisor.follow_parent()
    from experiments import cli

    try:
        status = cli.main()
    except RuntimeError as error:
        supervisor.wait_for_peers_news(error)
        raise
    finally:
        sys.stdout.flush()
    if status and supervisor.is_supervised():
        sys.stderr.flush()
        os._exit(status)  # the libraries would wait for the other processes
    return status


def _stop_at_once(number: int, frame: object) -> None:
    """Ends the process at once, except in the training loop, which saves first.

    An exception could be raised in a callback that drops it, or end an interpreter in which XLA is compiling. Nothing
    is lost: files are replaced whole.
    """
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # the cursor, which a progress bar hides
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
