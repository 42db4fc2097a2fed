"""Jobs of a batch: the input images and the file of every result."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pfstorer_rt.errors import SettingError
from pfstorer_rt.files import real_path
from pfstorer_rt.imaging.find import RESULT_SUFFIX, Note, is_result, list_images, matching, names_of, note_left_out
from pfstorer_rt.imaging.formats import SAVE_FORMATS
from pfstorer_rt.imaging.metadata import is_marked

STREAM = "-"
"""Standard input as an input, standard output as an output."""


@dataclass(frozen=True)
class Job:
    """One image: its file and the file of its result (None for standard input and output)."""

    source: Path | None
    target: Path | None
    explicit: bool
    """Whether the caller named this image alone. An existing result is then an error; otherwise it is skipped."""
    refusal: SettingError | None = None
    """Why this job cannot be done beside the others; it fails, and the others are done."""


@dataclass(frozen=True)
class Naming:
    """The pattern of result names: `{stem}{label}{suffix}{extension}`."""

    suffix: str = RESULT_SUFFIX
    """End of the stem. Images of a folder with this suffix are earlier results and are left out."""
    extension: str | None = None
    """Extension of every result, such as `.webp`; None keeps the input's extension, or selects PNG if its format cannot
    be written or holds no metadata."""
    label: str = ""
    """Part of every name, to distinguish the results of several engines."""

    def __post_init__(self) -> None:
        """Raise `SettingError` for a suffix that is a path, and for a format that cannot be written."""
        if set(self.suffix) & set("/\\\0"):
            raise SettingError(f"suffix {self.suffix!r}: expected the end of a file name, not a path", setting="suffix")
        if self.extension and self.extension not in SAVE_FORMATS:
            message = f"extension {self.extension!r}: expected one of {' '.join(SAVE_FORMATS)}"
            raise SettingError(message, setting="extension")

    def name(self, relative: Path) -> Path:
        """Return the path of a result, relative to the folder of results."""
        own = relative.suffix.lower()
        own = own if own in SAVE_FORMATS and own != ".bmp" else ".png"
        return relative.with_name(relative.stem + self.label + self.suffix + (self.extension or own))


class NoImagesError(SettingError):
    """The inputs contain no image."""


def plan_jobs(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    naming: Naming | None = None,
    note: Note = lambda _: None,
    overwrite: bool = False,
) -> list[Job]:
    """Find all images and choose the file of every result.

    inputs: files, folders (searched recursively), glob patterns, or `-` for standard input.
    output: the file of the result, if one image is named and the output has an extension. Otherwise a folder, in which
    the sub-folders of the inputs are kept. `-` is standard output. None writes results beside their inputs, and the
    result of standard input to standard output. note: receives a line for each reason why files were passed over.
    overwrite: whether results replace existing files; a named file is replaced only if it has the mark of a result.
    A job has a `refusal` if its result would have the name of another result or of an input.
    Raises `NoImagesError` when there is no image. Raises `SettingError` for an output that contradicts the inputs or
    the format, and if every job would have a refusal.
    """
    jobs = find_jobs(inputs, output, naming, note, note)
    named = {Path(text) for text in names_of(inputs) if overwrite and Path(text).is_file()} - {
        job.source for job in jobs
    }
    clashes = find_clashes(jobs, {path for path in named if not is_marked(path)})
    if clashes and len(clashes) == len(jobs):
        raise next(iter(clashes.values()))
    return [replace(job, refusal=clashes.get(job)) for job in jobs]


def find_jobs(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    naming: Naming | None = None,
    note: Note = lambda _: None,
    note_results: Note = lambda _: None,
) -> list[Job]:
    """Do the work of `plan_jobs`, but accept jobs whose results would replace each other or an input.

    note_results: receives a line about earlier results that are left out.
    """
    naming, texts = naming or Naming(), names_of(inputs)
    output = None if output is None else f"{output}"
    if output == "":
        raise SettingError("an empty name of the output; expected a file, a folder or -", setting="output")
    found = find_inputs(texts, naming.suffix, note, note_results)
    single = len(found) == 1 and not any(Path(text).is_dir() for text in texts) and not naming.label
    file = output_file(output)
    if file:
        check_file(file, naming.extension, single)
    jobs = []
    for source, relative in found:
        if _is_inside(source, output, texts):
            continue
        target: Path | None
        if output == STREAM or (output is None and source is None):
            target = None
        elif output is None:
            assert source is not None
            target = source.with_name(naming.name(relative).name)
        else:
            target = file if single and file else Path(output) / naming.name(relative)
        if target and target.suffix.lower() not in SAVE_FORMATS:
            known = " ".join(SAVE_FORMATS)
            raise SettingError(f"output {output}: images of this format cannot be written; use one of {known}")
        jobs.append(Job(source, target, source is None or (single and source == Path(texts[0]))))
    return jobs


def find_inputs(inputs: Sequence[str], suffix: str, note: Note, note_results: Note) -> list[tuple[Path | None, Path]]:
    """Expand files, folders, glob patterns and `-` to pairs: file (None for `-`), path relative to its folder.

    Earlier results and the files beside them are left out. They have a name `*{suffix}.*`, or a mark in their metadata.
    A file that is named alone is kept, whatever its name. A missing file is kept too, so that its failure is reported
    like others. Raises `NoImagesError` when nothing is found.
    """
    found: list[tuple[Path | None, Path]] = []
    for text in inputs:
        path = Path(text)
        if text == STREAM:
            found.append((None, Path("stdin.png")))
        elif path.is_dir():
            found.extend((p, p.relative_to(path)) for p in list_images(path, note=note))
        elif not path.exists() and glob.has_magic(text):
            found.extend((p, Path(p.name)) for p in matching(text, note))
        else:
            found.append((path, Path(path.name)))
    found = list(dict.fromkeys(found))
    alone = len(found) == 1 and not Path(inputs[0]).is_dir()
    fresh = found if alone else [pair for pair in found if pair[0] is None or not is_result(pair[0], suffix)]
    results = [path for path, name in found if path is not None and (path, name) not in fresh]
    if not fresh:
        if results:
            kept = f"{len(results)} earlier result(s) of this program"
            raise NoImagesError(f"no images in {' '.join(inputs)} except {kept}; name one alone to restore it again")
        if not inputs:
            raise NoImagesError("no inputs; expected files or folders of images")
        raise NoImagesError(f"no images in {' '.join(inputs)}; expected files such as .jpg, .png or .tif")
    note_left_out(results, note_results)
    return fresh


def output_file(output: str | None) -> Path | None:
    """Return the output if it is a file; None for a folder, for standard output, and without an output."""
    if output is None or output == STREAM or output.endswith("/") or Path(output).is_dir():
        return None
    return Path(output) if Path(output).suffix else None


def check_file(file: Path, extension: str | None = None, single: bool = True) -> None:
    """Raise `SettingError` for an output file that contradicts the number of results (`single`) or their format."""
    kind = SAVE_FORMATS.get(file.suffix.lower())
    if kind and not single:
        raise SettingError(f"output {file}: one file for several results; give a folder", setting="output")
    if kind and extension and kind != SAVE_FORMATS[extension]:
        wanted = SAVE_FORMATS[extension]
        raise SettingError(f"output {file} is {kind}, but the format is {wanted}; leave one of them out")


def is_lossy(job: Job, stream: str) -> bool:
    """Whether the format of a result has a quality setting (JPEG, WebP). stream: format of standard output."""
    return SAVE_FORMATS[job.target.suffix.lower() if job.target else f".{stream}"] in ("JPEG", "WEBP")


def _is_inside(source: Path | None, output: str | None, inputs: Sequence[str]) -> bool:
    """Whether an image is in the folder of results and that folder is inside an input folder."""
    if source is None or output is None or output == STREAM:
        return False
    results = real_path(output)
    folders = [real_path(text) for text in inputs if Path(text).is_dir()]
    below = results not in folders and any(results.is_relative_to(folder) for folder in folders)
    return below and results in real_path(source).parents


def find_clashes(jobs: Sequence[Job], kept: Collection[Path] = ()) -> dict[Job, SettingError]:
    """Return {job: error} for results that would replace another result, an input, or a file in `kept`."""
    rivals: dict[Path | None, list[Job]] = {}
    for job in jobs:
        rivals.setdefault(job.target, []).append(job)
    found: dict[Job, SettingError] = {}
    for target, group in rivals.items():
        if len(group) > 1:
            names = " and ".join(str(job.source or STREAM) for job in group)
            error = SettingError(
                f"{names} would all be written to {target or 'stdout'}; rename or leave out all but one"
            )
            found |= dict.fromkeys(group, error)
    # Several paths can name the same file. `realpath` also accepts a link to itself.
    sources = {os.path.realpath(path) for path in (*kept, *(job.source for job in jobs)) if path is not None}
    for job in jobs:
        if job.target is not None and os.path.realpath(job.target) in sources:
            message = f"{job.target} would be written over an input; use a suffix or another folder"
            found.setdefault(job, SettingError(message, setting="suffix"))
    return found
