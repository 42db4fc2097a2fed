"""Progress bars on stderr, shown where it is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pfstorer_rt.console import stderr
from pfstorer_rt.runtime.batch import OnStep
from pfstorer_rt.runtime.jobs import Job


@contextmanager
def batch_bars(title: str, total: int | None = None) -> Iterator[OnStep]:
    """Show a bar for the current image, and one for the batch where it has several images.

    total: images in the batch; None where it is unknown.
    """
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        overall = progress.add_task(title, total=total) if total is None or total > 1 else None
        current = progress.add_task("", total=None)
        begun = 0

        def show(job: Job, done: int, steps: int) -> None:
            nonlocal begun
            if not steps:  # a new image
                name = job.source.name if job.source else "stdin"
                progress.reset(current, total=None, description=name)
                if overall is not None:
                    progress.update(overall, completed=begun)
                begun += 1
            else:
                progress.update(current, completed=done, total=steps)

        yield show


@contextmanager
def count_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show one bar; yields a function (done, total)."""
    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
