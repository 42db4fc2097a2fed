"""Restore or degrade many images: find them, read the next one and write the last one while one is worked on."""

from __future__ import annotations

import glob
import io
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pfstorer_rt.console import stderr
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.files import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Scan,
    encode_image,
    save_image,
    scan_image,
)
from pfstorer_rt.imaging.find import list_images
from pfstorer_rt.imaging.rows import Pixels, Rows, read_pixels

Work = Callable[[int, Rows, Callable[[int, int], None]], Rows]
"""work(number of the job from 0, rows of the image, step(done, total)) -> rows of the result."""
STREAM = "-"
BESIDE = ("compare", "preview")
"""What may be written beside a result, and ends the names of such files."""


@dataclass(frozen=True)
class Job:
    """One picture: where it is, and where its result goes (None for stdin and stdout)."""

    source: Path | None
    target: Path | None
    explicit: bool
    """Named by the user, not found in a folder: then an existing target is an error, not a skip."""


@dataclass(frozen=True)
class Saving:
    """How results are written."""

    overwrite: bool = False
    quality: int = 95
    """Of JPEG and WebP."""
    stream: str = "png"
    """Format of a result that goes to stdout."""


class NoImagesError(ValueError):
    """There is nothing to do; a folder that is watched is left at that."""


def find_inputs(inputs: Sequence[str], suffix: str) -> list[tuple[Path | None, Path]]:
    """Expand files, folders (recursive), globs and `-` to (file, path relative to its folder) pairs.

    Results of earlier runs, named `*{suffix}.*`, and what lies beside them are left out of folders. A name that matches
    nothing is kept, so that its failure is reported like any other. Raises `NoImagesError` for none at all.
    """
    found: list[tuple[Path | None, Path]] = []
    results = 0
    for text in inputs:
        path = Path(text)
        if text == STREAM:
            found.append((None, Path("stdin.png")))
        elif path.is_dir():
            inside = list_images(path)
            fresh = [p for p in inside if not is_result(p.stem, suffix)]
            found.extend((p, p.relative_to(path)) for p in fresh)
            results += len(inside) - len(fresh)
        elif not path.exists() and glob.has_magic(text):
            found.extend((Path(p), Path(Path(p).name)) for p in sorted(glob.glob(text, recursive=True)))
        else:
            found.append((path, Path(path.name)))
    if not found:
        but = f" but {results} whose names end in {suffix}, as results do (--suffix)" if results else ""
        raise NoImagesError(f"no images in {' '.join(inputs)}{but}; expected {' '.join(IMAGE_SUFFIXES)}")
    return list(dict.fromkeys(found))


def is_result(stem: str, suffix: str) -> bool:
    """Whether a file's name says that it was written by an earlier run."""
    return bool(suffix) and stem.endswith((suffix, *(f"{suffix}_{word}" for word in BESIDE)))


def write(job: Job, scan: Scan, rows: Rows, saving: Saving) -> None:
    """Save a result with the alpha, profile and EXIF of its input; `saving.stream` on stdout."""
    kept: dict[str, Any] = {"icc": scan.icc, "exif": scan.exif, "quality": saving.quality}
    if scan.alpha is not None:
        kept["alpha"] = resize_alpha(scan.alpha, rows.height, rows.width)
    if job.target is None:
        sys.stdout.buffer.write(encode_image(rows, saving.stream, **kept))
        return
    save_image(job.target, rows, overwrite=saving.overwrite, **kept)


def resize_alpha(alpha: Rows, height: int, width: int) -> Rows | Pixels:
    """Resize rows of one channel to the size of a result: rows, or (H, W) pixels in [0, 1]."""
    from PIL import Image

    if (alpha.height, alpha.width) == (height, width):
        return alpha
    whole = Image.fromarray(read_pixels(alpha, 0, alpha.height)[..., 0], "F")
    return np.clip(np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC), np.float32), 0, 1)


def refuse_existing(job: Job, saving: Saving) -> bool:
    """Return whether a job is done already; raises `PFStorerError` where the user asked for it by name."""
    if job.target is None or saving.overwrite or not job.target.exists():
        return False
    if job.explicit:
        raise PFStorerError(f"{job.target}: exists already; choose another name or pass --overwrite")
    return True


Show = Callable[[dict[str, Any]], None]
"""show(report of one picture): called once for each job, in order."""
Facts = Callable[[Job, Rows, Rows], dict[str, Any]]
"""facts(job, rows of the input, rows of the result): more entries of a picture's report; `notes` are added up."""
FAILURES = (PFStorerError, OSError, MemoryError)


def run_jobs(
    jobs: Sequence[Job],
    work: Work,
    *,
    saving: Saving,
    show: Show,
    title: str,
    max_pixels: int = MAX_PIXELS,
    facts: Facts = lambda job, source, result: {},
) -> int:
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
            show({**names(job), "status": "done", **size, "seconds": seconds, **more})

        def fail(job: Job, error: BaseException) -> None:
            failed.append(job)
            text = " ".join(str(error).split()) or type(error).__name__
            show({**names(job), "status": "failed", "error": text})

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
                    reports.append(disk.submit(show, {**names(job), "status": "skipped"}))
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
