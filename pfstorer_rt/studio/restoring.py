"""Actions of the tab that restores: take pictures, find faces, restore, measure the likeness, pack the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.errors import PFStorerError, SettingError, one_line
from pfstorer_rt.faces.dlib import face_models
from pfstorer_rt.faces.finding import SEARCHED, shrunk
from pfstorer_rt.faces.likeness import Likeness, read_likeness
from pfstorer_rt.faces.references import FARTHER, NO_FACE, References
from pfstorer_rt.imaging.files import load_image, save_image, scan_image
from pfstorer_rt.runtime.batch import BatchConfig, Outcome, Saving, restore_jobs
from pfstorer_rt.runtime.jobs import Job, Naming, plan_jobs
from pfstorer_rt.runtime.package import package_results
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.work import Report
from pfstorer_rt.studio.workspace import Session, Workspace

SHOWN = 4096
"""Longer side in pixels of the pictures that the page shows; downloads have the full size."""
SHOWN_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
"""Formats of results that a browser shows."""
EXPECTED = (PFStorerError, OSError, MemoryError)
"""Errors that the page explains; all others are defects."""
FACES_OF = 24
"""Number of pictures in which faces are searched at once."""
LIKENESS = ("id_distance", "id_distance_input")
"""Entries of a report about the likeness."""


@dataclass(frozen=True)
class Dials:
    """The settings that the page offers."""

    strength: float = 1.0
    seed: float | None = 0
    """None, an empty field, is 0."""
    steps: float | None = 0
    """0 and None select the default of the base or plan."""
    scale: float = 1.0
    remove_scratches: bool = False

    def config(self) -> RestoreConfig:
        """Return the settings of the library."""
        return RestoreConfig(
            steps=int(self.steps or 0) or None,
            seed=int(self.seed or 0),
            strength=float(self.strength),
            scale=float(self.scale),
            remove_scratches=bool(self.remove_scratches),
        )


@dataclass(frozen=True)
class Found:
    """A dropped picture and its faces."""

    name: str
    picture: str
    """Address of the picture with a frame around each face."""
    text: str
    """One sentence about the faces."""


def take_pictures(workspace: Workspace, session: Session, files: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Copy the dropped pictures into the session; returns the readable ones, and a message for each other one.

    Raises `SettingError` for too many files and for a file that is too large.
    """
    session.inputs, session.outcomes, refused = [], {}, []
    for path in workspace.take(files, session.folder / "inputs"):
        try:
            workspace.check_pixels(path)
            session.inputs.append(path)
        except PFStorerError as error:
            refused.append(one_line(error))
    return session.inputs, refused


def take_references(workspace: Workspace, session: Session, files: Sequence[str]) -> str:
    """Measure the faces of photographs of the person; returns a sentence. Without files, forgets the old ones.

    Results lose the likeness that was measured before; `compare_results` measures it again. Raises `PFStorerError`.
    """
    use_references(session, None)
    if not files:
        return ""
    folder = session.folder / "references"
    for path in workspace.take(files, folder):
        workspace.check_pixels(path)
    references = References.read(folder)
    use_references(session, references)
    faces = len(references.faces)
    return f"The likeness is compared with {faces} face{'s' if faces > 1 else ''}."


def use_references(session: Session, references: References | None) -> None:
    """Compare with other photographs from now on; None: with the identity.

    The page labels every distance by the photographs in use. Distances to other photographs are therefore deleted.
    """
    if references is not session.references:
        session.references = references
        session.outcomes = {path: without_likeness(outcome) for path, outcome in session.outcomes.items()}


def known_face(session: Session, engines: Engines, choice: str) -> References | None:
    """Return the dropped photographs of the person, else the mean embedding that the engine of a choice stores.

    Returns None where there is neither, and without the `metrics` extra. Raises `PFStorerError`.
    """
    if session.references is not None or face_models() is None:
        return session.references
    face = engines.face(choice)
    return References([np.array(face, np.float64)]) if face else None


def find_faces(workspace: Workspace, session: Session, engines: Engines, choice: str, report: Report) -> list[Found]:
    """Find the faces of the dropped pictures, and the face of the chosen person; empty without the `metrics` extra."""
    if face_models() is None:
        return []
    from pfstorer_rt.faces.marking import mark_faces

    person = known_face(session, engines, choice)
    known = person.faces if person else ()
    found = []
    for number, path in enumerate(session.inputs[:FACES_OF]):
        report(f"searching for faces: {path.name}", number / len(session.inputs[:FACES_OF]))
        pixels, _ = shrunk(load_image(path, workspace.limits.pixels).pixels, SEARCHED)
        marked = mark_faces(pixels, known)
        target = session.folder / f"faces_{number}.jpg"
        marked.image.save(target, quality=88)
        text = describe_faces(marked.faces, marked.person, marked.compared)
        found.append(Found(path.name, workspace.publish(target), text))
    return found


def describe_faces(faces: int, person: int | None, compared: bool) -> str:
    """Return one sentence about the faces of a picture."""
    if not faces:
        return "No face found. The picture is restored as a whole."
    others = f" {faces - 1} other{'s' if faces > 2 else ''} found." if faces > 1 else ""
    if person is None:
        return f"{faces} face{'s' if faces > 1 else ''} found, none of them looks like the person."
    if compared:
        return f"The green frame shows the person.{others}"
    return f"The green frame shows the largest face.{others}" if faces > 1 else "One face found."


def restore(
    workspace: Workspace,
    session: Session,
    engines: Engines,
    choice: str,
    dials: Dials,
    report: Report,
    only: Path | None = None,
) -> list[Outcome]:
    """Restore the pictures of a session, or one of them; returns the outcomes of this call.

    Earlier results of the same pictures are replaced. A person without a plan gets one first. Raises `PFStorerError`,
    and `CancelledError` between two tiles; finished results are kept.
    """
    if not session.inputs:
        raise SettingError("no picture: drop one first")
    note = engines.prepare(choice, report)
    report("opening the engine")
    config = BatchConfig(
        dials.config(),
        saving=Saving(overwrite=True),
        references=known_face(session, engines, choice),
        max_pixels=workspace.limits.pixels,
    )
    targets = result_files(session)
    jobs = [Job(path, targets[path], False) for path in ([only] if only else session.inputs)]

    def follow(job: Job, done: int, total: int) -> None:
        assert job.source is not None
        number = [each.source for each in jobs].index(job.source)
        share = (number + (done / total if total else 0)) / len(jobs)
        report(f"restoring {job.source.name} ({number + 1} of {len(jobs)})", share or None)

    def keep(outcome: Outcome) -> None:
        assert outcome.job.source is not None
        session.choices[outcome.job.source] = choice
        session.outcomes[outcome.job.source] = replace(outcome, notes=(*outcome.notes, *([note] if note else [])))

    with engines.use(choice) as restorer:
        restore_jobs(restorer, jobs, config, keep, follow)
    return [session.outcomes[job.source] for job in jobs if job.source is not None]


def result_files(session: Session) -> dict[Path, Path]:
    """Return the file of the result of every picture; pictures such as `a.png` and `a.gif` get different ones."""
    folder, found, used = session.folder / "results", {}, set()
    for path in session.inputs:
        number, (job,) = 1, plan_jobs([path], folder)
        # Some disks, and some readers of the zip, take `A.png` and `a.png` as one file.
        while job.target is None or job.target.name.casefold() in used:
            number += 1
            (job,) = plan_jobs([path], folder, Naming(label=f"_{number}"))
        used.add(job.target.name.casefold())
        found[path] = job.target
    return found


def compare_results(workspace: Workspace, session: Session, engines: Engines, report: Report) -> None:
    """Measure the likeness of existing results again, after photographs of the person were dropped or removed.

    Without photographs, each result is compared with the identity that restored it, if that has a mean embedding.
    """
    done = [(path, one) for path, one in session.outcomes.items() if one.status == "done" and one.job.target]
    people: dict[str, References | None] = {}
    for number, (path, outcome) in enumerate(done):
        choice = session.choices[path]
        if choice not in people:
            people[choice] = person_of(session, engines, choice)
        person, target = people[choice], outcome.job.target
        if person is None or target is None:
            session.outcomes[path] = without_likeness(outcome)
            continue
        report(f"comparing {path.name} with the person", number / len(done))
        source, result = (scan_image(file, workspace.limits.pixels).pixels for file in (path, target))
        facts = person.facts(source, result)
        kept = without_likeness(outcome)
        notes = (*kept.notes, *facts.pop("notes", []))
        session.outcomes[path] = replace(kept, notes=notes, details={**kept.details, **facts})


def person_of(session: Session, engines: Engines, choice: str) -> References | None:
    """Return what `known_face` returns; None for a person whose file cannot be read any more."""
    try:
        return known_face(session, engines, choice)
    except PFStorerError:  # deleted or renamed after the restoration
        return None


def without_likeness(outcome: Outcome) -> Outcome:
    """Return an outcome as if its likeness had not been measured."""
    notes = tuple(note for note in outcome.notes if not is_about_likeness(note))
    details = {key: value for key, value in outcome.details.items() if key not in LIKENESS}
    return replace(outcome, notes=notes, details=details)


def is_about_likeness(note: str) -> bool:
    """Whether a note of an outcome repeats what `likeness` reads."""
    return note.startswith((FARTHER, NO_FACE))


def likeness(outcome: Outcome) -> Likeness | None:
    """Return the reading of a result's likeness; None where it was not measured."""
    if "id_distance" not in outcome.details:
        return None
    return read_likeness(outcome.details["id_distance"], outcome.details.get("id_distance_input"))


def before_and_after(workspace: Workspace, session: Session, path: Path) -> tuple[str, str]:
    """Return the addresses of a picture and its result, for the viewer. Raises `SettingError` without a result."""
    outcome = session.outcomes.get(path)
    if outcome is None or outcome.status != "done" or outcome.job.target is None:
        reason = one_line(outcome.error) if outcome and outcome.error else "it was not restored yet"
        raise SettingError(f"{path.name}: {reason}")
    return shown(workspace, session, path), shown(workspace, session, outcome.job.target)


def shown(workspace: Workspace, session: Session, path: Path) -> str:
    """Return the address of a picture in a form that every browser shows: upright, sRGB, of limited size."""
    longer = max(workspace.check_pixels(path))
    if path.parent.name == "results" and path.suffix.lower() in SHOWN_FORMATS and longer <= SHOWN:
        return workspace.publish(path)
    folder = session.folder / "shown"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{path.parent.name}_{path.name}.png"
    if not target.exists() or target.stat().st_mtime_ns < path.stat().st_mtime_ns:
        pixels, _ = shrunk(load_image(path, workspace.limits.pixels).pixels, SHOWN)
        save_image(target, pixels, overwrite=True)
    return workspace.publish(target)


def package(workspace: Workspace, session: Session) -> str:
    """Return the address of a zip with all results and a report; raises `SettingError` without a result."""
    outcomes = [session.outcomes[path] for path in session.inputs if path in session.outcomes]
    return workspace.publish(package_results(session.folder / "restored.zip", outcomes))


def explain(error: BaseException) -> str:
    """Return an error as one line for the page."""
    if isinstance(error, EXPECTED):
        return one_line(error)
    return f"unexpected {type(error).__name__}: {one_line(error)}"
