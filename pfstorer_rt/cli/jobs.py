"""Do jobs one after the other, with the next picture read and the last one written meanwhile."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pfstorer_rt.cli.pictures import STREAM, Job, Saving, Work, refuse_existing, show, write
from pfstorer_rt.console import stderr
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.files import MAX_PIXELS, Scan, scan_image
from pfstorer_rt.imaging.rows import Rows

Facts = Callable[[Job, Rows, Rows], dict[str, Any]]
"""facts(job, rows of the input, rows of the result): more entries of a picture's report; `notes` are added up."""
FAILURES = (PFStorerError, OSError, MemoryError)


def run_jobs(
    jobs: Sequence[Job], work: Work, *, saving: Saving, as_json: bool, title: str, max_pixels: int = MAX_PIXELS,
    facts: Facts = lambda job, source, result: {},
) -> int:  # fmt: skip
    """Do all jobs; a failed one is reported and the others go on. Returns the exit status, 0 or 1.

    One thread beside this one reads ahead and writes behind, so that never more than one picture is being decoded or
    encoded, whatever their number.
    """
    failed: list[Job] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(1) as disk,
    ):
        overall = progress.add_task(title, total=len(jobs)) if len(jobs) > 1 else None

        def finish(job: Job, started: float, scan: Scan, rows: Rows) -> None:
            try:
                write(job, scan, rows, saving)
                more = facts(job, scan.pixels, rows)
            except FAILURES as error:
                fail(job, error)
                return
            notes = [*scan.notes, *more.pop("notes", ())]
            seconds = round(time.perf_counter() - started, 3)
            size = {"width": rows.width, "height": rows.height, **({"notes": notes} if notes else {})}
            show({**names(job), "status": "done", **size, "seconds": seconds, **more}, as_json)

        def fail(job: Job, error: BaseException) -> None:
            failed.append(job)
            text = " ".join(str(error).split()) or type(error).__name__
            show({**names(job), "status": "failed", "error": text}, as_json)

        ahead: Future[Scan | None] | None = None
        written: Future[None] | None = None
        reports: list[Future[None]] = []
        for number, job in enumerate(jobs):
            reading = ahead or disk.submit(read, job, saving, max_pixels)
            started = time.perf_counter()
            bar = progress.add_task(job.source.name if job.source else "stdin", total=None)

            def step(done: int, total: int, bar: TaskID = bar) -> None:
                progress.update(bar, completed=done, total=total)

            try:
                scan = reading.result()
                following = jobs[number + 1] if number + 1 < len(jobs) else None
                ahead = disk.submit(read, following, saving, max_pixels) if following else None
                if scan is None:
                    reports.append(disk.submit(show, {**names(job), "status": "skipped"}, as_json))
                else:
                    rows = work(number, scan.pixels, step)
                    if written:
                        written.result()
                    written = disk.submit(finish, job, started, scan, rows)
                    reports.append(written)
            except FAILURES as error:
                ahead = ahead if ahead is not reading else None
                reports.append(disk.submit(fail, job, error))
            progress.remove_task(bar)
            if overall is not None:
                progress.advance(overall)
        for report in reports:
            report.result()  # raises what a report itself ran into, such as a full disk behind stdout
    return 1 if failed else 0


def names(job: Job) -> dict[str, str]:
    """Return the entries that every report begins with."""
    return {"input": str(job.source or STREAM), "output": str(job.target or STREAM)}


def read(job: Job, saving: Saving, max_pixels: int) -> Scan | None:
    """Read a job's picture, after a look at its target; None where the job is done already."""
    if refuse_existing(job, saving):
        return None
    if job.target is not None:
        make_folder(job.target.parent)
    return scan_image(io.BytesIO(sys.stdin.buffer.read()) if job.source is None else job.source, max_pixels)
