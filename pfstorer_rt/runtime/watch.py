"""Restore images as they arrive in a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pfstorer_rt.runtime.batch import BatchConfig, OnOutcome, OnStep, Outcome, ignore, restore_jobs
from pfstorer_rt.runtime.jobs import Job, Naming, NoImagesError, check_file, output_file, plan_jobs

if TYPE_CHECKING:
    from pfstorer_rt.runtime.restorer import Restorer


def watch_folder(
    restorer: Restorer,
    folder: str | Path,
    output: str | Path | None = None,
    settings: BatchConfig | None = None,
    idle: float | None = None,
    on_outcome: OnOutcome = ignore,
    on_step: OnStep = ignore,
) -> list[Outcome]:
    """Restore images as they arrive in a folder.

    An image is restored once its file has not changed for a second, and again when the file changes later: a file that
    was read half-written is tried again, and the result of a replaced image is replaced. idle: return after this many
    seconds without a new or changed image; None watches until the call is interrupted.
    """
    settings = settings or BatchConfig()
    if file := output_file(None if output is None else f"{output}"):
        check_file(file, settings.naming.extension, single=False)
    replacing = replace(settings, saving=replace(settings.saving, overwrite=True))
    outcomes: list[Outcome] = []
    for jobs in _arrivals(folder, output, settings.naming, idle):
        written = {outcome.job for outcome in outcomes if outcome.status == "done"}
        fresh, changed = [job for job in jobs if job not in written], [job for job in jobs if job in written]
        outcomes += restore_jobs(restorer, fresh, settings, on_outcome, on_step)
        outcomes += restore_jobs(restorer, changed, replacing, on_outcome, on_step)
    return outcomes


def _arrivals(folder: str | Path, output: str | Path | None, naming: Naming, idle: float | None) -> Iterator[list[Job]]:
    """Yield the jobs of new and changed images once their files are stable."""
    seen: dict[Path, tuple[int, ...]] = {}
    done: dict[Path, tuple[int, ...]] = {}
    latest = time.monotonic()
    while True:
        try:
            jobs = plan_jobs((folder,), output, naming)
        except NoImagesError:
            jobs = []
        found = {job.source: job for job in jobs if job.source is not None}
        current = {path: state for path in found if (state := _file_state(path))}
        stable = {path for path, state in current.items() if seen.get(path) == state}
        ready = [path for path in current if path in stable and done.get(path) != current[path]]
        if ready:
            done |= {path: current[path] for path in ready}
            yield [found[path] for path in ready]
            latest = time.monotonic()
        elif idle is not None and len(stable) == len(current) and time.monotonic() - latest >= idle:
            return
        seen = current
        time.sleep(1)


def _file_state(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change whenever a file is written or replaced; None for an empty or vanished file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns, status.st_ino) if status.st_size else None
