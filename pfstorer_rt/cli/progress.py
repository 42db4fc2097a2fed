"""Progress bars on stderr, shown where it is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pfstorer_rt.console import echo, printable, stderr, text_column
from pfstorer_rt.runtime.batch import OnStep
from pfstorer_rt.runtime.jobs import Job


@contextmanager
def batch_bars(title: str, total: int | None = None) -> Iterator[OnStep]:
    """Show a bar for the current image, and one for the batch where it has several images.

    total: images in the batch; None where it is unknown. Without a terminal, an image that takes long prints lines.
    """
    if not sys.stderr.isatty():  # before the import of rich, which takes longer than a small image
        yield LogLines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as progress:
        overall = progress.add_task(title, total=total) if total is None or total > 1 else None
        current = progress.add_task("", total=None)
        begun = 0

        def show(job: Job, done: int, steps: int) -> None:
            nonlocal begun
            if not steps:  # a new image
                progress.reset(current, total=None, description=image_name(job))
                if overall is not None:
                    progress.update(overall, completed=begun)
                begun += 1
            elif done < steps:
                progress.update(current, completed=done, total=steps)
            else:
                progress.reset(current, total=None, description=f"{image_name(job)}: correcting colours, writing")

        yield show


def image_name(job: Job) -> str:
    """Return the file name of a job's image, for a progress report."""
    return printable(job.source.name) if job.source else "stdin"


class LogLines:
    """Prints a line about the current image at intervals, for logs."""

    INTERVAL = 20.0
    """Seconds between two lines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started = self.latest = clock()

    def __call__(self, job: Job, done: int, steps: int) -> None:
        """Note the start of an image (`steps` 0), or print its state if the last line is old enough."""
        now = self.clock()
        if not steps:
            self.started = self.latest = now
        elif now - self.latest >= self.INTERVAL or (done == steps and now - self.started >= self.INTERVAL):
            self.latest = now
            left = (now - self.started) * (steps - done) / done
            state = f"{done} of {steps} tiles, about {left:.0f} s left"
            echo(f"{image_name(job)}: {state if done < steps else 'correcting colours, writing'}", err=True)


@contextmanager
def count_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show one bar; yields a function (done, total)."""
    from rich.progress import Progress

    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
