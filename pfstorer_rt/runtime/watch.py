"""Restore images as they arrive in a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pfstorer_rt.imaging.find import Note
from pfstorer_rt.runtime.batch import BatchConfig, OnOutcome, OnStep, Outcome, ignore, restore_jobs
from pfstorer_rt.runtime.jobs import Job, Naming, NoImagesError, check_file, find_clashes, find_jobs, output_file

if TYPE_CHECKING:
    from pfstorer_rt.runtime.restorer import Restorer

EMPTY = 10.0
"""Seconds after which an empty file is a failure. A program may create a file some time before it writes it."""


def watch_folder(
    restorer: Restorer,
    folder: str | Path,
    output: str | Path | None = None,
    settings: BatchConfig | None = None,
    idle: float | None = None,
    on_outcome: OnOutcome = ignore,
    on_step: OnStep = ignore,
    note: Note = ignore,
) -> list[Outcome]:
    """Restore images as they arrive in a folder.

    An image is restored once its file has not changed for a second, and again when the file changes later: a file that
    was read half-written is tried again, and the result of a replaced image is replaced. Images whose results would
    have the same name fail until one of them is renamed or removed. An empty file fails after `EMPTY` seconds. idle:
    return after this many seconds without a new or changed image; None watches until the call is interrupted. note:
    receives a line for each reason why files are passed over, once. Returns the last outcome of each image.
    """
    settings = settings or BatchConfig()
    if file := output_file(None if output is None else f"{output}"):
        check_file(file, settings.naming.extension, single=False)
    replacing = replace(settings, saving=replace(settings.saving, overwrite=True))
    latest: dict[Path | None, Outcome] = {}
    written: set[Job] = set()
    for jobs in _arrivals(folder, output, settings.naming, idle, note):
        fresh, changed = [job for job in jobs if job not in written], [job for job in jobs if job in written]
        outcomes = restore_jobs(restorer, fresh, settings, on_outcome, on_step)
        outcomes += restore_jobs(restorer, changed, replacing, on_outcome, on_step)
        latest |= {outcome.job.source: outcome for outcome in outcomes}
        written |= {outcome.job for outcome in outcomes if outcome.status == "done"}
    return [*latest.values()]


def _arrivals(
    folder: str | Path, output: str | Path | None, naming: Naming, idle: float | None, note: Note
) -> Iterator[list[Job]]:
    """Yield the jobs of new and changed images once their files are stable; a job that clashes has a refusal."""
    seen: dict[Path, tuple[int, ...]] = {}
    done: dict[Path, tuple[int, ...]] = {}
    refused: dict[Path, tuple[int, ...]] = {}
    notes: list[str] = []
    latest = time.monotonic()
    while True:
        before, notes = notes, []
        try:
            jobs = find_jobs((folder,), output, naming, notes.append)
        except NoImagesError:
            jobs = []
        for text in notes:
            if text not in before:
                note(text)
        found = {job.source: job for job in jobs if job.source is not None}
        current = {path: state for path in found if (state := _file_state(path))}
        stable = {path for path, state in current.items() if seen.get(path) == state}
        clashes = find_clashes(jobs)
        clashing = {job.source for job in clashes}
        refused = {path: state for path, state in refused.items() if path in clashing}
        ready = [p for p in current if p in stable and current[p] not in (done.get(p), refused.get(p))]
        if ready:
            refused |= {path: current[path] for path in ready if path in clashing}
            done |= {path: current[path] for path in ready if path not in clashing}
            yield [replace(found[path], refusal=clashes.get(found[path])) for path in ready]
            latest = time.monotonic()
        elif idle is not None and len(stable) == len(found) and time.monotonic() - latest >= idle:
            return
        seen = current
        time.sleep(1)


def _file_state(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change whenever a file is written or replaced; None for a vanished or a new, empty file."""
    try:
        status = path.stat()
    except OSError:
        return None
    starting = status.st_size == 0 and 0 <= time.time() - status.st_mtime < EMPTY
    return None if starting else (status.st_size, status.st_mtime_ns, status.st_ino)
