"""The terminal: results go to stdout, everything else to this console on stderr."""

from __future__ import annotations

from rich.console import Console


def stderr() -> Console:
    """Return a console on the current stderr (looked up at each call, so that redirection works)."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Return a text with every control character spelled out.

    A name or a value from another person's file could otherwise give commands to the terminal (escape sequences).
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
