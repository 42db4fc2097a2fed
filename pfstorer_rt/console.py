"""Terminal output: results go to stdout, progress and messages to a console on stderr."""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from pfstorer_rt.progress import OnProgress, StageProgress

if TYPE_CHECKING:  # rich is imported where bars are drawn, so that commands without bars start faster
    from rich.console import Console
    from rich.progress import Progress, TaskID, TextColumn

RECENT = 20
"""Losses in the mean that is shown: single samples differ much in their loss."""
LINES = 10
"""Number of progress lines per stage if stderr is not a terminal; a shorter stage has no lines."""
SILENCE = 60.0
"""Longest time in seconds between two of these lines, for slow stages."""


def open_closed_streams() -> None:
    """Connect closed standard streams to the null device; a closed `sys.stdout` stays None.

    Without it, the next file that is opened gets the number of the closed stream, and messages of libraries enter it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def escape_unencodable() -> None:
    """Let stdout and stderr escape characters that their encoding does not have, instead of raising an error.

    File names can contain characters outside the encoding of the terminal, and bytes that are no text.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")


def stderr() -> Console:
    """Return a console on the current stderr. Each call uses `sys.stderr` again, so that redirection works."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def echo(line: str, err: bool = False) -> None:
    """Print one line on stdout, or on stderr with `err`. Every command prints through this function."""
    click.echo(printable(line), err=err)


def note(text: str) -> None:
    """Print a note on stderr."""
    echo(f"note: {text}", err=True)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Return a text with escaped control characters.

    Names and values from another person's file could otherwise contain terminal escape sequences.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def text_column(template: str) -> TextColumn:
    """Return a column of a progress bar whose text is no markup: a name may contain square brackets."""
    from rich.progress import TextColumn

    return TextColumn(template, markup=False)


@contextmanager
def stage_bars() -> Iterator[OnProgress]:
    """Yield a callback that draws one progress bar per stage on a terminal, or else prints lines."""
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    console = stderr()
    columns = (text_column("{task.description}"), BarColumn(), text_column("{task.fields[state]}"))
    quiet = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet, refresh_per_second=2) as bars:
        yield StageBars(bars)


class StageBars:
    """Shows the progress of all stages on the console of `bars`."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.first: dict[str, StageProgress] = {}
        self.lines: dict[str, int] = {}
        self.printed: dict[str, float] = {}
        """Seconds of a stage at its last line."""
        self.losses: dict[str, deque[float]] = {}

    def __call__(self, progress: StageProgress) -> None:
        """Show one progress report. A stage is resumed if its first report contains finished work."""
        stage, lines, console = progress.stage, math.floor(LINES * progress.share), self.bars.console
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=1.0, state="")
            self.first[stage], self.lines[stage], self.printed[stage] = progress, lines, progress.seconds
            self.losses[stage] = deque(maxlen=RECENT)
            if progress.done:
                how = "finished by an earlier run" if progress.share >= 1 else f"resuming from {count(progress)}"
                console.print(f"{stage}: {how}")
        state = f"{count(progress)}  {self.speed(progress)}".rstrip()
        self.bars.update(self.tasks[stage], completed=progress.share, state=state)
        long = progress.total is None or progress.total >= LINES
        due = lines > self.lines[stage] or progress.seconds - self.printed[stage] >= SILENCE
        if not console.is_terminal and long and due:
            console.print(f"{stage}: {state}")
            self.printed[stage] = progress.seconds
        self.lines[stage] = lines

    def speed(self, progress: StageProgress) -> str:
        """Return the mean of the last losses, if the stage has a loss, and the iterations or samples per second."""
        losses = self.losses[progress.stage]
        if not math.isnan(progress.loss):
            losses.append(progress.loss)
        loss = f"loss {sum(losses) / len(losses):.4f}  " if losses else ""
        rate = (progress.done - self.first[progress.stage].done) / progress.seconds if progress.seconds else 0.0
        return f"{loss}{rate:.2f}/s" if rate else ""


def count(progress: StageProgress) -> str:
    """Return finished and total iterations or samples, or the share of the time limit if there is no total."""
    if progress.total is None:
        return f"iteration {progress.done} ({progress.share:.0%} of the time)"
    return f"{progress.done}/{progress.total}"
