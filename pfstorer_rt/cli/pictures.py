"""Pictures in, pictures out: what `restore` and `degrade` share of inputs, names and output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pfstorer_rt.console import printable
from pfstorer_rt.imaging.files import SAVE_FORMATS
from pfstorer_rt.runtime.batch import STREAM, Job, Saving, find_inputs


def plan_jobs(
    inputs: Sequence[str], output: str | None, suffix: str, extension: str | None = None, engine: str = ""
) -> list[Job]:
    """Decide where every result goes.

    `output` with one picture that was named is a file where it has a suffix and is no folder, otherwise a
    folder that keeps sub-folders. Without it results go beside their inputs as `{stem}{engine}{suffix}{ext}`, and
    stdin to stdout. extension: of all results, such as `.webp`; None keeps the input's where it can be written.
    engine: what tells the results of several engines apart.
    Raises `click.UsageError` when two results, or a result and its input, would have one name, and for an `output` that
    does not go with the rest: a picture's name for several results, or another format than `extension`.
    """
    found = find_inputs(inputs, suffix)
    single = len(found) == 1 and not any(Path(text).is_dir() for text in inputs) and not engine
    file = output_file(output)
    if file:
        check_file(file, extension, single)
    explicit = {Path(text) for text in inputs if not Path(text).is_dir()}
    jobs = []
    for source, relative in found:
        if is_inside(source, output, inputs):
            continue
        own = relative.suffix.lower() if relative.suffix.lower() in SAVE_FORMATS else ".png"
        named = relative.with_name(relative.stem + engine + suffix + (extension or own))
        target: Path | None
        if output == STREAM or (output is None and source is None):
            target = None
        elif output is None:
            assert source is not None
            target = source.with_name(named.name)
        elif single and file:
            target = file
        else:
            target = Path(output) / named
        jobs.append(Job(source, target, source is None or source in explicit))
    check_targets(jobs, output)
    return jobs


def output_file(output: str | None) -> Path | None:
    """Return the file that an output names; None for a folder, stdout, or none given."""
    if output is None or output == STREAM or output.endswith("/") or Path(output).is_dir():
        return None
    return Path(output) if Path(output).suffix else None


def check_file(file: Path, extension: str | None, single: bool) -> None:
    """Raise `click.UsageError` for a file that says another thing than the inputs or the format."""
    kind = SAVE_FORMATS.get(file.suffix.lower())
    if kind and not single:
        raise click.UsageError(f"-o {file}: a picture's name for several results; give a folder")
    if kind and extension and kind != SAVE_FORMATS[extension]:
        raise click.UsageError(f"-o {file} is {kind}, --format says {SAVE_FORMATS[extension]}; leave one of them out")


def is_inside(source: Path | None, output: str | None, inputs: Sequence[str]) -> bool:
    """Whether a picture lies in the folder of results, where that is a part of a folder of inputs."""
    if source is None or output in (None, STREAM):
        return False
    results = Path(str(output)).resolve()
    folders = [Path(text).resolve() for text in inputs if Path(text).is_dir()]
    below = results not in folders and any(results.is_relative_to(folder) for folder in folders)
    return below and results in source.resolve().parents


def check_targets(jobs: Sequence[Job], output: str | None) -> None:
    """Raise `click.UsageError` when a result cannot be written, or would be over an input or another result."""
    if any(job.target and job.target.suffix.lower() not in SAVE_FORMATS for job in jobs):
        raise click.UsageError(f"{output}: no kind of picture that can be written; use one of {' '.join(SAVE_FORMATS)}")
    targets = [job.target for job in jobs]
    if len(set(targets)) < len(targets):
        twice = next(t for t in targets if targets.count(t) > 1)
        rivals = " and ".join(str(job.source or STREAM) for job in jobs if job.target == twice)
        raise click.UsageError(f"{rivals} would all be written to {twice or 'stdout'}; rename or leave out all but one")
    sources = {job.source.resolve() for job in jobs if job.source is not None}  # however they are spelled
    if same := [target for target in targets if target is not None and target.resolve() in sources]:
        raise click.UsageError(f"{same[0]} would be written over an input; give a --suffix or another folder")


def is_lossy(job: Job, saving: Saving) -> bool:
    """Whether a result's format has a quality: JPEG and WebP."""
    return SAVE_FORMATS[job.target.suffix.lower() if job.target else f".{saving.stream}"] in ("JPEG", "WEBP")


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print one result; to stderr when the picture itself is on stdout."""
    to_stderr = report["output"] == STREAM
    if as_json:
        click.echo(json.dumps(report), err=to_stderr)
    elif report["status"] == "failed":
        about = "" if report["error"].startswith(report["input"]) else f"{report['input']}: "
        click.echo(printable(f"failed: {about}{report['error']}"), err=True)
    elif report["status"] == "skipped":
        click.echo(printable(f"{report['output']}: exists, skipped"))
    else:
        notes = "".join(f" ({note})" for note in report.get("notes", ()))
        click.echo(
            printable(f"{report['output']}: {report['width']}x{report['height']}, {report['seconds']:.1f} s{notes}"),
            err=to_stderr,
        )
