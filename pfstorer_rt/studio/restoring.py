"""Actions of the tab that restores: take pictures, find faces, restore, measure the likeness, pack the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.errors import PFStorerError, SettingError, one_line
from pfstorer_rt.faces.dlib import face_models
from pfstorer_rt.faces.finding import SEARCHED, shrunk
from pfstorer_rt.faces.likeness import Likeness, read_likeness
from pfstorer_rt.faces.references import References
from pfstorer_rt.imaging.files import load_image, save_image
from pfstorer_rt.runtime.batch import BatchConfig, Outcome, Saving, restore_jobs
from pfstorer_rt.runtime.jobs import Job, plan_jobs
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


@dataclass(frozen=True)
class Dials:
    """The settings that the page offers."""

    strength: float = 1.0
    seed: int = 0
    steps: int = 0
    """0 selects the default of the base or plan."""
    scale: float = 1.0

    def config(self) -> RestoreConfig:
        """Return the settings of the library."""
        return RestoreConfig(
            steps=int(self.steps) or None, seed=int(self.seed), strength=float(self.strength), scale=float(self.scale)
        )


@dataclass(frozen=True)
class Found:
    """A dropped picture and its faces."""

    name: str
    picture: str
    """Address of the picture with a frame around each face."""
    text: str
    """One sentence about the faces."""


def take_pictures(workspace: Workspace, session: Session, files: Sequence[str]) -> list[Path]:
    """Copy the dropped pictures into the session; raises `PFStorerError` for one that cannot be read."""
    session.inputs, session.outcomes = [], {}
    taken = workspace.take(files, session.folder / "inputs")
    for path in taken:
        workspace.check_pixels(path)
    session.inputs = taken
    return taken


def take_references(workspace: Workspace, session: Session, files: Sequence[str]) -> str:
    """Measure the faces of photographs of the person; returns a sentence. Without files, forgets the old ones."""
    session.references = None
    if not files:
        return ""
    folder = session.folder / "references"
    for path in workspace.take(files, folder):
        workspace.check_pixels(path)
    session.references = References(folder)
    faces = len(session.references.faces)
    return f"The likeness is compared with {faces} face{'s' if faces > 1 else ''}."


def find_faces(workspace: Workspace, session: Session, report: Report) -> list[Found]:
    """Find the faces of the dropped pictures; an empty list without the `metrics` extra."""
    if face_models() is None:
        return []
    from pfstorer_rt.faces.marking import mark_faces

    known = session.references.faces if session.references else ()
    found = []
    for number, path in enumerate(session.inputs[:FACES_OF]):
        report(f"looking for faces: {path.name}", number / len(session.inputs[:FACES_OF]))
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

    Earlier results of the same pictures are replaced. Raises `PFStorerError`, and `CancelledError` between two tiles;
    finished results are kept.
    """
    if not session.inputs:
        raise SettingError("no picture: drop one first")
    report("opening the engine")
    config = BatchConfig(
        dials.config(),
        saving=Saving(overwrite=True),
        references=session.references or session.learned.get(choice.removeprefix("identity:")),
        max_pixels=workspace.limits.pixels,
    )
    jobs = [
        Job(path, plan_jobs([path], session.folder / "results")[0].target, False)
        for path in ([only] if only else session.inputs)
    ]

    def follow(job: Job, done: int, total: int) -> None:
        assert job.source is not None
        number = [each.source for each in jobs].index(job.source)
        share = (number + (done / total if total else 0)) / len(jobs)
        report(f"restoring {job.source.name} ({number + 1} of {len(jobs)})", share or None)

    def keep(outcome: Outcome) -> None:
        assert outcome.job.source is not None
        session.outcomes[outcome.job.source] = outcome

    with engines.use(choice) as restorer:
        return restore_jobs(restorer, jobs, config, keep, follow)


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
