"""The terminal: results go to stdout, everything else to this console on stderr."""

from __future__ import annotations

from rich.console import Console


def stderr() -> Console:
    """Return a console on the current stderr (looked up at each call, so that redirection works)."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
