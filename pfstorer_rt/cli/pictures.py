"""Pictures in, pictures out: what `restore` and `degrade` share of inputs, names, output and failures."""

from __future__ import annotations

import glob
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pfstorer_rt.console import stderr
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import make_folder
from pfstorer_rt.image import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    SAVE_FORMATS,
    Picture,
    encode_image,
    load_image,
    save_image,
)

Pixels = npt.NDArray[np.float32]
Work = Callable[[int, Pixels, Callable[[int, int], None]], Pixels]
"""work(number of the job from 0, pixels (H, W, 3) in [0, 1], step(done, total)) -> pixels."""
STREAM = "-"


@dataclass(frozen=True)
class Job:
    """One picture: where it is, and where its result goes (None for stdin and stdout)."""

    source: Path | None
    target: Path | None
    explicit: bool
    """Named by the user, not found in a folder: then an existing target is an error, not a skip."""


def find_inputs(inputs: Sequence[str], suffix: str) -> list[tuple[Path | None, Path]]:
    """Expand files, folders (recursive), globs and `-` to (file, path relative to its folder) pairs.

    Results of earlier runs, named `*{suffix}.*`, are left out of folders. A name that matches nothing
    is kept, so that its failure is reported like any other. Raises `click.UsageError` for none at all.
    """
    found: list[tuple[Path | None, Path]] = []
    for text in inputs:
        path = Path(text)
        if text == STREAM:
            found.append((None, Path("stdin.png")))
        elif path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            found.extend((p, p.relative_to(path)) for p in inside if not p.stem.endswith(suffix))
        elif not path.exists() and glob.has_magic(text):
            found.extend((Path(p), Path(Path(p).name)) for p in sorted(glob.glob(text, recursive=True)))
        else:
            found.append((path, Path(path.name)))
    if not found:
        raise click.UsageError(f"no pictures in {' '.join(inputs)}; expected {' '.join(IMAGE_SUFFIXES)}")
    return list(dict.fromkeys(found))


def plan_jobs(inputs: Sequence[str], output: str | None, suffix: str) -> list[Job]:
    """Decide where every result goes.

    `output` with one picture that was named is a file where it has a suffix and is no folder, otherwise a
    folder that keeps sub-folders. Without it results go beside their inputs as `{stem}{suffix}{ext}`, and stdin to
    stdout. Raises `click.UsageError` when two results would have one name.
    """
    found = find_inputs(inputs, suffix)
    single = len(found) == 1 and not any(Path(text).is_dir() for text in inputs)
    explicit = {Path(text) for text in inputs if not Path(text).is_dir()}
    jobs = []
    for source, relative in found:
        extension = relative.suffix.lower() if relative.suffix.lower() in SAVE_FORMATS else ".png"
        named = relative.with_name(relative.stem + suffix + extension)
        target: Path | None
        if output == STREAM or (output is None and source is None):
            target = None
        elif output is None:
            assert source is not None
            target = source.with_name(named.name)
        elif single and Path(output).suffix and not Path(output).is_dir() and not output.endswith("/"):
            target = Path(output)
        else:
            target = Path(output) / named
        jobs.append(Job(source, target, source is None or source in explicit))
    if any(job.target and job.target.suffix.lower() not in SAVE_FORMATS for job in jobs):
        raise click.UsageError(f"{output}: no kind of picture that can be written; use one of {' '.join(SAVE_FORMATS)}")
    targets = [job.target for job in jobs]
    if len(set(targets)) < len(targets):
        twice = next(t for t in targets if targets.count(t) > 1)
        raise click.UsageError(f"several inputs would be written to {twice or 'stdout'}; give them apart")
    return jobs


def run_jobs(
    jobs: Sequence[Job], work: Work, *, overwrite: bool, as_json: bool, title: str, max_pixels: int = MAX_PIXELS,
    facts: Callable[[], dict[str, Any]] = dict,
) -> int:  # fmt: skip
    """Do all jobs; a failed one is reported and the others go on. Returns the exit status, 0 or 1.

    facts: called after each picture for more entries of its JSON object.
    """
    failures = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        overall = progress.add_task(title, total=len(jobs)) if len(jobs) > 1 else None
        for number, job in enumerate(jobs):
            bar = progress.add_task(job.source.name if job.source else "stdin", total=None)
            started = time.perf_counter()
            report: dict[str, Any] = {"input": str(job.source or STREAM), "output": str(job.target or STREAM)}

            def step(done: int, total: int, bar: TaskID = bar) -> None:
                progress.update(bar, completed=done, total=total)

            try:
                report |= run_job(job, partial(work, number), overwrite, max_pixels, step)
                if report["status"] == "done":
                    report |= {"seconds": round(time.perf_counter() - started, 3), **facts()}
            except (PFStorerError, OSError, MemoryError) as error:
                failures += 1
                report |= {"status": "failed", "error": " ".join(str(error).split()) or type(error).__name__}
            progress.remove_task(bar)
            if overall is not None:
                progress.advance(overall)
            show(report, as_json)
    return 1 if failures else 0


def run_job(
    job: Job, work: Callable[[Pixels, Callable[[int, int], None]], Pixels], overwrite: bool, max_pixels: int,
    step: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Do one job; returns its status, size and notes. A target that exists already is not touched."""
    if job.target is not None and job.target.exists() and not overwrite:
        if job.explicit:
            raise PFStorerError(f"{job.target}: exists already; choose another name or pass --overwrite")
        return {"status": "skipped"}
    if job.target is not None:
        make_folder(job.target.parent)
    picture = load_image(io.BytesIO(sys.stdin.buffer.read()) if job.source is None else job.source, max_pixels)
    pixels = work(picture.pixels, step)
    write(job, picture, pixels, overwrite)
    size = {"width": pixels.shape[1], "height": pixels.shape[0]}
    return {"status": "done", **size, **({"notes": list(picture.notes)} if picture.notes else {})}


def write(job: Job, picture: Picture, pixels: Pixels, overwrite: bool) -> None:
    """Save a result with the alpha, profile and EXIF of its input; PNG on stdout."""
    kept: dict[str, Any] = {"icc": picture.icc, "exif": picture.exif}
    if picture.alpha is not None:
        kept["alpha"] = resize_alpha(picture.alpha, pixels.shape[:2])
    if job.target is None:
        sys.stdout.buffer.write(encode_image(pixels, "png", **kept))
        return
    save_image(job.target, pixels, overwrite=overwrite, **kept)


def resize_alpha(alpha: Pixels, size: tuple[int, ...]) -> Pixels:
    """Resize (H, W) in [0, 1] to a result's size."""
    from PIL import Image

    if alpha.shape == size:
        return alpha
    resized = Image.fromarray(alpha, "F").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(resized, np.float32), 0, 1)


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print one result; to stderr when the picture itself is on stdout."""
    to_stderr = report["output"] == STREAM
    if as_json:
        click.echo(json.dumps(report), err=to_stderr)
    elif report["status"] == "failed":
        about = "" if report["error"].startswith(report["input"]) else f"{report['input']}: "
        click.echo(f"failed: {about}{report['error']}", err=True)
    elif report["status"] == "skipped":
        click.echo(f"{report['output']}: exists, skipped")
    else:
        notes = "".join(f" ({note})" for note in report.get("notes", ()))
        click.echo(
            f"{report['output']}: {report['width']}x{report['height']}, {report['seconds']:.1f} s{notes}",
            err=to_stderr,
        )
