"""Process many images; a second thread reads the next image and writes the last result meanwhile.

Nothing is printed here. `on_outcome` is called once for every image, in order, from the thread that reads and writes.
An exception from it ends the batch after all finished images are written. The caller's thread calls `on_step`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.engine.session import out_of_memory
from pfstorer_rt.errors import ExistsError, PFStorerError, SettingError, one_line
from pfstorer_rt.files import check_target, exists_already, make_folder, show_path, write_to_stdout
from pfstorer_rt.imaging.bands import result_size
from pfstorer_rt.imaging.files import (
    MAX_PIXELS,
    Scan,
    encode_image,
    image_size,
    read_stream,
    save_image,
    scan_image,
)
from pfstorer_rt.imaging.formats import SAVE_FORMATS, check_side
from pfstorer_rt.imaging.metadata import Metadata
from pfstorer_rt.imaging.rows import Rows, resize_alpha
from pfstorer_rt.imaging.sidebyside import SideBySide
from pfstorer_rt.imaging.turned import turned
from pfstorer_rt.runtime.jobs import STREAM, Job, Naming, plan_jobs
from pfstorer_rt.runtime.selection import ApplyTo, Chooser

if TYPE_CHECKING:
    from pfstorer_rt.faces.references import References
    from pfstorer_rt.runtime.coarse import Passes
    from pfstorer_rt.runtime.restorer import Restorer

Status = Literal["done", "skipped", "failed", "planned"]


@dataclass(frozen=True)
class Saving:
    """Settings of the written results."""

    overwrite: bool = False
    quality: int = 95
    """Quality of JPEG and WebP, 1-100."""
    stream: str = "png"
    """Format of a result on standard output."""
    mark: bool = True
    """Whether restored images carry IPTC's machine-readable mark that they were made with AI."""


@dataclass(frozen=True)
class BatchConfig:
    """Settings of a batch of images."""

    restore: RestoreConfig = field(default_factory=RestoreConfig)
    naming: Naming = field(default_factory=Naming)
    saving: Saving = field(default_factory=Saving)
    compare: bool = False
    """Write `{result}_compare` too: input and result side by side."""
    preview: bool = False
    """Write `{result}_preview` first, restored in one step."""
    references: References | None = None
    """Reference photographs; the distance of every result to them is reported."""
    apply_to: ApplyTo = "matching"
    """Where the identity acts in an image with several faces."""
    max_pixels: int = MAX_PIXELS
    """Larger images are refused."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one image."""

    job: Job
    status: Status
    width: int = 0
    height: int = 0
    """Size of the result in pixels: width and height."""
    seconds: float = 0.0
    """Time from the start of the work to the written result."""
    notes: tuple[str, ...] = ()
    """Notes for the user about this image."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further facts: seed, steps, tiles, distances, or a forecast."""
    error: Exception | None = None

    def report(self) -> dict[str, object]:
        """Return everything as one dictionary of JSON values."""
        done = {"width": self.width, "height": self.height, "seconds": self.seconds} if self.status == "done" else {}
        return {
            "input": str(self.job.source or STREAM),
            "output": str(self.job.target or STREAM),
            "status": self.status,
            **done,
            **({"notes": list(self.notes)} if self.notes else {}),
            **self.details,
            **({"error": one_line(self.error)} if self.error else {}),
        }


OnOutcome = Callable[[Outcome], None]
OnStep = Callable[[Job, int, int], None]
"""on_step(job, done, total): (job, 0, 0) at the beginning of a job, then tiles of this image."""


class Details(NamedTuple):
    """Facts and notes about one finished image."""

    entries: dict[str, object]
    notes: Sequence[str]


class Work(Protocol):
    """The work on every image of a batch."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the result of an image."""
        ...

    def process(self, number: int, job: Job, rows: Rows, step: Callable[[int, int], None]) -> Rows:
        """Compute the rows of a result. number: index of the job. step: called with (done, total)."""
        ...

    def details(self, job: Job, source: Rows, result: Rows) -> Details:
        """Describe a result that has been written."""
        ...


def ignore(*_: object) -> None:
    """Ignore an event."""


def restore_files(
    restorer: Restorer,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    settings: BatchConfig | None = None,
    on_outcome: OnOutcome = ignore,
    on_step: OnStep = ignore,
) -> list[Outcome]:
    """Restore files and folders; a failed image becomes an outcome and does not affect the others.

    inputs, output: as in `plan_jobs`. Raises `SettingError` for settings that contradict each other or do not fit the
    engine, before any work.
    """
    settings = settings or BatchConfig()
    jobs = plan_jobs(inputs, output, settings.naming, overwrite=settings.saving.overwrite)
    check_beside(jobs, settings)
    return restore_jobs(restorer, jobs, settings, on_outcome, on_step)


def restore_jobs(
    restorer: Restorer,
    jobs: Sequence[Job],
    settings: BatchConfig,
    on_outcome: OnOutcome = ignore,
    on_step: OnStep = ignore,
) -> list[Outcome]:
    """Restore the images of jobs from `plan_jobs`."""
    restorer.recipe(settings.restore)  # raises for settings that do not fit the engine
    work = _Restoring(restorer, settings)  # raises for settings that do not fit this installation
    return run_jobs(jobs, work, settings.saving, settings.max_pixels, on_outcome, on_step)


def all_existing(jobs: Sequence[Job], saving: Saving) -> list[Outcome]:
    """Return the outcomes of jobs whose results all exist already; an empty list if there is any work.

    An image that the caller named fails, and others are skipped.
    """
    return [_existing(job) for job in jobs] if all(_exists(job, saving) for job in jobs) else []


def without_work(jobs: Sequence[Job], settings: BatchConfig) -> list[Outcome]:
    """Return the outcomes of jobs if none can be done; an empty list if there is work, for a check before long work.

    A result may exist or may not be written in its folder, or an image cannot be read.
    """
    outcomes = []
    for job in jobs:
        if job.refusal or _exists(job, settings.saving):
            outcomes.append(_existing(job))
            continue
        try:
            if job.target is not None:
                check_target(job.target)
            if job.source is not None:
                image_size(job.source, settings.max_pixels)
            return []
        except PFStorerError as error:
            outcomes.append(Outcome(job, "failed", error=error))
    return outcomes


def forecast_jobs(
    restorer: Restorer, jobs: Sequence[Job], settings: BatchConfig, on_outcome: OnOutcome = ignore
) -> list[Outcome]:
    """Forecast tiles, memory and time of every job without restoring it; status `planned`, `skipped` or `failed`.

    Raises `SettingError` for standard input, which can be read only once.
    """
    from pfstorer_rt.runtime.forecast import Forecaster

    if any(job.source is None for job in jobs):
        raise SettingError("standard input has no forecast: it can be read only once; name a file")
    work, forecaster = _Restoring(restorer, settings), Forecaster(restorer, settings.restore)

    def forecast(job: Job) -> Outcome:
        if job.refusal:
            return Outcome(job, "failed", error=job.refusal)
        if job.target is not None and job.target.exists() and not job.explicit and not settings.saving.overwrite:
            return Outcome(job, "skipped")
        assert job.source is not None
        try:
            size = image_size(job.source, settings.max_pixels)
            check_result(job, *work.size(*size), settings.saving, settings.max_pixels)
            passes = work.passes(*size, partial(_read_rows, job.source, settings.max_pixels))
            predicted = forecaster.predict(*size, passes)
        except PFStorerError as error:
            return Outcome(job, "failed", error=error)
        return Outcome(job, "planned", notes=predicted.passes.notes, details=predicted.facts())

    outcomes = []
    for job in jobs:
        outcomes.append(forecast(job))
        on_outcome(outcomes[-1])
    return outcomes


def _read_rows(path: Path, max_pixels: int) -> Rows:
    return scan_image(path, max_pixels).pixels


class NoEffect(NamedTuple):
    """A setting that has no effect with an engine."""

    setting: str
    value: object
    reason: str


def without_effect(restorer: Restorer, settings: BatchConfig) -> list[NoEffect]:
    """Return the settings that have no effect with this engine."""
    config, found = settings.restore, []
    if config.strength != 1.0 and restorer.manifest.identity_name is None:
        found.append(NoEffect("strength", config.strength, "this engine contains no identity"))
    recipe = restorer.recipe(config)
    if config.eta and recipe.sampler != "ddim":
        found.append(
            NoEffect("eta", config.eta, f"only the sampler ddim uses it, and this sampler is {recipe.sampler}")
        )
    elif config.eta and recipe.steps == 1:
        found.append(NoEffect("eta", config.eta, "no noise is added after the last step, and there is one step"))
    if settings.preview and recipe.steps == 1:
        found.append(NoEffect("preview", True, "the result itself takes one step"))
    return found


def face_chooser(restorer: Restorer, settings: BatchConfig) -> Chooser:
    """Return the choice of the faces on which the identity acts; raises as `Chooser` does."""
    known = settings.references.mean if settings.references else None
    return Chooser(restorer.manifest, settings.restore, settings.apply_to, known)


def engine_notes(restorer: Restorer, settings: BatchConfig) -> list[str]:
    """Return the notes on the device of an engine, and on the faces on which its identity acts."""
    return [note for note in (restorer.note, *face_chooser(restorer, settings).notes()) if note]


class _Restoring:
    """Restores the images of a batch, and writes the files beside a result."""

    def __init__(self, restorer: Restorer, settings: BatchConfig) -> None:
        self.restorer, self.settings = restorer, settings
        self._chooser = face_chooser(restorer, settings)
        self._passes: dict[Job, Passes] = {}
        self._turns: dict[Job, int] = {}  # as in `Choice`
        self._notes: dict[Job, list[str]] = {}

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the result of an image."""
        return result_size(height, width, self.settings.restore.scale)

    def process(self, number: int, job: Job, rows: Rows, step: Callable[[int, int], None]) -> Rows:
        """Restore an image, after its preview."""
        config = self.settings.restore
        prepared = self.restorer.prepared(rows, config)
        if config.remove_scratches and prepared is rows:
            self._notes.setdefault(job, []).append("no scratches were found")
        chosen = self._chooser.choose(prepared)
        self._turns[job], rows = chosen.turns, turned(prepared, chosen.turns)
        if self.settings.preview and job.target and self.restorer.recipe(config).steps > 1:
            first = replace(config, steps=1)
            passes = self.restorer.passes(rows, first).chosen(chosen)
            preview = self.restorer.restore_rows(rows, first, passes=passes)
            self._write_beside(job, "preview", turned(preview, -chosen.turns))
        self._passes[job] = passes = self.restorer.passes(rows, config).chosen(chosen)
        return turned(self.restorer.restore_rows(rows, config, step, passes), -chosen.turns)

    def passes(self, height: int, width: int, read: Callable[[], Rows]) -> Passes | None:
        """Return the passes of an image if they depend on its content, which `read` returns."""
        restorer, config = self.restorer, self.settings.restore
        if not (self._chooser.depends_on_content or restorer.needs_content(height, width, config)):
            return None
        rows = restorer.prepared(read(), config)
        chosen = self._chooser.choose(rows)
        return restorer.passes(turned(rows, chosen.turns), config).chosen(chosen)

    def details(self, job: Job, source: Rows, result: Rows) -> Details:
        """Return the settings in use, the number of tiles, and the distances to the references."""
        config, restorer = self.settings.restore, self.restorer
        passes, turns = self._passes.pop(job), self._turns.pop(job)
        facts, recipe = passes.facts(), passes.fine.recipe
        entries: dict[str, object] = {
            "seed": config.seed,
            "steps": recipe.steps,
            "sampler": recipe.sampler,
            "strength": config.strength,
            "backend": restorer.backend,
            "provider": restorer.provider,
            **{name: facts[name] for name in ("tiles", "coarse_scale") if name in facts},
        }
        notes = list(passes.notes)
        if self.settings.compare:
            entries |= self._write_beside(job, "compare", SideBySide(source, result))
        if self.settings.references:
            advice = {} if restorer.manifest.identity_name else {"advice": "use a plan with an identity of the person"}
            measured = self.settings.references.facts(turned(source, turns), turned(result, turns), **advice)
            notes += measured.pop("notes", ())
            entries |= measured
        return Details(entries, [*notes, *self._notes.pop(job, ())])

    def _write_beside(self, job: Job, word: str, rows: Rows) -> dict[str, str]:
        """Write `{result}_{word}`; an existing file stays unless results may be overwritten."""
        if job.target is None:
            return {}
        path, saving = _beside(job.target, word), self.settings.saving
        if path.exists() and not saving.overwrite:
            self._notes.setdefault(job, []).append(f"{path} exists already and was left as it is")
            return {}
        try:
            check_side(SAVE_FORMATS[path.suffix.lower()], rows.width, rows.height)
        except PFStorerError as error:
            self._notes.setdefault(job, []).append(f"{path} was not written: {error}")
            return {}
        metadata = Metadata().marked() if saving.mark else Metadata()
        save_image(path, rows, metadata=metadata, overwrite=saving.overwrite, quality=saving.quality)
        return {word: str(path)}


def run_jobs(
    jobs: Sequence[Job], work: Work, saving: Saving, max_pixels: int, on_outcome: OnOutcome, on_step: OnStep
) -> list[Outcome]:
    """Do all jobs. A second thread reads the next image and writes the last result, one image at a time."""
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        on_outcome(outcome)

    def finish(job: Job, started: float, scan: Scan, rows: Rows) -> None:
        try:
            try:
                write(job, scan, rows, saving)
            except ExistsError:
                report(Outcome(job, "skipped", notes=("another process wrote the result meanwhile",)))
                return
            entries, notes = work.details(job, scan.pixels, rows)
        except Exception as error:
            report(Outcome(job, "failed", error=failure(error)))
            return
        seconds = round(time.perf_counter() - started, 3)
        report(Outcome(job, "done", rows.width, rows.height, seconds, (*scan.notes, *notes), entries))

    with ThreadPoolExecutor(1) as disk:
        reports: list[Future[None]] = []
        ahead = [disk.submit(read, job, saving, max_pixels) for job in jobs[:1]]
        for number, job in enumerate(jobs):
            started = time.perf_counter()
            on_step(job, 0, 0)
            reading, ahead = ahead[0], []
            try:
                wait([reading])
                ahead = [disk.submit(read, following, saving, max_pixels) for following in jobs[number + 1 :][:1]]
                scan = reading.result()
                if scan is None:
                    reports.append(disk.submit(report, Outcome(job, "skipped")))
                    continue
                height, width = work.size(scan.pixels.height, scan.pixels.width)
                check_result(job, height, width, saving, max_pixels)
                rows = work.process(number, job, scan.pixels, partial(on_step, job))
                wait(reports[-1:])  # no more than one result waits to be written
                reports.append(disk.submit(finish, job, started, scan, rows))
            except Exception as error:
                reports.append(disk.submit(report, Outcome(job, "failed", error=failure(error))))
        for reported in reports:
            reported.result()  # re-raises an exception from `on_outcome`, such as for a full disk at standard output
    return outcomes


def failure(error: Exception) -> Exception:
    """Return the error of one image, which does not affect the other images; raises all other errors again."""
    if isinstance(error, (PFStorerError, OSError)):
        return error
    if out_of_memory(error):
        return PFStorerError("too little memory for this image; close other programs, or use a smaller scale")
    raise error


def _beside(target: Path, word: str) -> Path:
    """Return the file beside a result, `{result}_{word}`."""
    return target.with_name(f"{target.stem}_{word}{target.suffix}")


def check_beside(jobs: Sequence[Job], settings: BatchConfig) -> None:
    """Raise `SettingError` if a file beside a result would have the name of an input or of another result."""
    words = [word for word, wanted in (("compare", settings.compare), ("preview", settings.preview)) if wanted]
    taken = {path for job in jobs for path in (job.source, job.target)}
    for job in jobs:
        for path in (_beside(job.target, word) for word in words if job.target):
            if path in taken:
                raise SettingError(
                    f"{path} is an input or a result, and would be written beside {job.target}; rename it"
                )


def read(job: Job, saving: Saving, max_pixels: int) -> Scan | None:
    """Read a job's image and make the folder of its result; None when the job is already done."""
    if job.refusal:
        raise job.refusal
    if _is_done(job, saving):
        return None
    if job.target is not None:
        make_folder(job.target.parent)
        check_target(job.target)
    elif sys.stdout is None:
        raise SettingError("standard output is closed; name a file or a folder", setting="output")
    return scan_image(read_stream(sys.stdin.buffer) if job.source is None else job.source, max_pixels)


def check_result(job: Job, height: int, width: int, saving: Saving, max_pixels: int) -> None:
    """Raise `PFStorerError` if a result of this size has too many pixels, or is too large for its format."""
    name = show_path(job.target or STREAM)
    if height * width > max_pixels:
        raise SettingError(
            f"{name}: {width} x {height} is {width * height} pixels; expected at most {max_pixels}; use a smaller "
            "scale or raise the limit",
            setting="max_pixels",
        )
    try:
        check_side(SAVE_FORMATS[job.target.suffix.lower() if job.target else f".{saving.stream}"], width, height)
    except PFStorerError as error:
        raise PFStorerError(f"{name}: {error}") from error


def _exists(job: Job, saving: Saving) -> bool:
    """Whether there is a result that must not be replaced."""
    return job.target is not None and not saving.overwrite and os.path.lexists(job.target)


def _existing(job: Job) -> Outcome:
    error = job.refusal or _refusal(job)
    return Outcome(job, "failed" if error else "skipped", error=error)


def _refusal(job: Job) -> PFStorerError | None:
    """Return the error for an existing result if the caller named the image, else None."""
    return exists_already(job.target) if job.explicit and job.target else None


def _is_done(job: Job, saving: Saving) -> bool:
    """Whether a result exists; raises `PFStorerError` if it exists and the caller named this image."""
    if not _exists(job, saving):
        return False
    if refusal := _refusal(job):
        raise refusal
    return True


def write(job: Job, scan: Scan, rows: Rows, saving: Saving) -> None:
    """Save a result with the alpha channel, colour profile and metadata of its input."""
    metadata = scan.metadata.scaled(rows.width / scan.pixels.width, rows.height / scan.pixels.height)
    metadata = metadata.marked() if saving.mark else metadata
    kept: dict[str, Any] = {"metadata": metadata, "quality": saving.quality}
    if scan.alpha is not None:
        kept["alpha"] = resize_alpha(scan.alpha, rows.height, rows.width)
    if job.target is None:
        write_to_stdout(encode_image(rows, saving.stream, **kept))
        return
    save_image(job.target, rows, overwrite=saving.overwrite, **kept)
