"""The command line."""

from __future__ import annotations

import os
import signal


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (`program.run`). Ctrl-C during the first imports ends the process at once, status 130."""
    # A command in the background ignores SIGINT.
    watched = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if watched:
            signal.signal(signal.SIGINT, _leave)
    except ValueError:  # only the main thread can set handlers
        watched = False
    try:
        from pfstorer_rt.cli.imports import fast_imports

        with fast_imports():
            from pfstorer_rt.cli.program import run
    finally:
        if watched:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    run(arguments)


def _leave(number: int, frame: object) -> None:
    """End the process: nothing was begun, and an exception during an import becomes another error or a traceback."""
    os.write(2, b"Error: Interrupted.\n")
    os._exit(130)
