"""Actions of the tab of people: choose photographs, learn, rename, delete, export and import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.errors import PFStorerError, SettingError, one_line
from pfstorer_rt.extras import needed_by
from pfstorer_rt.faces.dlib import to_uint8
from pfstorer_rt.identity import Identity, list_identities, list_unfinished, named_identity
from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.progress import StageProgress
from pfstorer_rt.runtime.identities import delete_identity, import_identity, passphrase_of, rename_identity
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.work import Report
from pfstorer_rt.studio.workspace import Session, Workspace

if TYPE_CHECKING:
    from pfstorer_rt.training.framing import Reference

MOST = 10
"""Largest number of photographs of a person."""
SIDE = 224
"""Side of the crops that the page shows, in pixels."""
CONSENT = (
    "This person, or the person's legal guardian, has agreed that the face is learned. I know that the identity file "
    "is biometric data and that it stays on this machine until I delete it."
)
LENGTHS: dict[str, Callable[[PersonalizeConfig], PersonalizeConfig]] = {
    "Usual": lambda config: config,
    "Thorough (several times as long)": lambda config: config.thorough(),
    "Short (two fifths)": lambda config: config.longer(0.4),
}
"""Choice -> settings of the training, from the defaults of the base."""
STAGES = {"photographs": ("reading photographs", 0.0, 0.03), "crops": ("preparing crops", 0.03, 0.1)}
"""Stage before the training -> its text, and the shares of the progress bar where it starts and ends."""


@dataclass(frozen=True)
class Judged:
    """A photograph, and whether it is used."""

    name: str
    crop: str
    """Address of the crop; empty for a file that cannot be read."""
    reason: str
    """Why the photograph is not used; empty for one that is used."""


@dataclass(frozen=True)
class Known:
    """A stored identity."""

    name: str
    text: str
    """Base and number of photographs, or why the file cannot be read."""
    finished: bool = True


def judge_photographs(
    workspace: Workspace, session: Session, engines: Engines, files: Sequence[str], report: Report
) -> list[Judged]:
    """Copy the photographs into the session, and choose which of them are used.

    A file that cannot be read is not used, and its copy is deleted. Raises `PFStorerError`.
    """
    folder = session.folder / "photographs"
    if not files:
        raise SettingError("no photograph: drop 3 to 5 photographs of one person")
    report("reading the photographs")
    paths, refused = [], []
    for path in workspace.take(files, folder, MOST):
        try:
            workspace.check_pixels(path)
            paths.append(path)
        except PFStorerError as error:
            reason = workspace.without_folders(one_line(error)).removeprefix(f"{path.name}: ")
            refused.append(Judged(path.name, "", reason))
            path.unlink()
    report("searching for faces")
    read_ones = read(paths, engines) if paths else []
    judged = [
        Judged(
            reference.path.name,
            crop_address(workspace, session, reference),
            workspace.without_folders(reference.left_out),
        )
        for reference in read_ones
    ]
    return judged + refused


def read(paths: Sequence[Path], engines: Engines) -> list[Reference]:
    """Read and crop photographs as the training does."""
    with needed_by("learning a person", "train"):
        from pfstorer_rt.training.framing import read_references

        base = engines.base()
        return read_references(paths, PersonalizeConfig.for_base(base.config), base.config.tile, lambda _: None)


def crop_address(workspace: Workspace, session: Session, reference: Reference) -> str:
    """Write the crop of a photograph; returns its address."""
    image = Image.fromarray(to_uint8(reference.photo.permute(1, 2, 0).numpy()))
    target = session.folder / f"crop_{reference.path.name}.jpg"
    ImageOps.fit(image, (SIDE, SIDE)).save(target, quality=88)
    return workspace.publish(target)


@dataclass(frozen=True)
class Learning:
    """What to learn."""

    name: str
    consent: bool
    length: str = "Usual"


def learn(
    workspace: Workspace, session: Session, engines: Engines, wanted: Learning, report: Report
) -> tuple[Identity, list[str]]:
    """Learn a person from the photographs of the session; returns the identity and the notes.

    `report` receives the addresses of a photograph, of the same photograph degraded, and of its restoration as
    `extra`. `CancelledError` leaves a checkpoint: the same call then resumes the training. Raises `PFStorerError`, also
    without consent and for a name that is used already.
    """
    if not wanted.consent:
        raise SettingError("consent is missing: tick the sentence about consent first")
    folder = session.folder / "photographs"
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    if not paths:
        raise SettingError("no photograph: drop 3 to 5 photographs of one person")
    target = named_identity(wanted.name.strip())
    if target.exists():
        raise PFStorerError(f"{wanted.name}: this person is known already; choose another name or delete it first")
    notes: list[str] = []
    with needed_by("learning a person", "train"):
        from pfstorer_rt.models.base import load_base
        from pfstorer_rt.training.personalize import personalize

    report("loading the base")
    base = load_base(engines.config.base)  # a second copy: the training changes the precision of its weights
    config = PersonalizeConfig.for_base(base.config)
    config = LENGTHS.get(wanted.length, LENGTHS["Usual"])(config)
    iterations = config.train.iterations
    preview = Preview(workspace, session, engines, read(paths, engines))

    def follow(progress: StageProgress) -> None:
        what, start, end = STAGES.get(progress.stage, ("learning", 0.1, 1.0))
        report(f"{what}: {progress.done} of {progress.total}", start + (end - start) * progress.share)

    def show(iteration: int, identity: Identity) -> None:
        share = 0.1 + 0.9 * iteration / iterations
        report(f"learning: {iteration} of {iterations}", share, preview.after(iteration, identity))

    every = max(1, min(25, iterations // 8))
    identity = personalize(
        wanted.name.strip(), paths, base, config, target, notes.append, follow, on_preview=show, preview_every=every
    )
    return identity, notes


class Preview:
    """Restores one degraded photograph with the unfinished identity."""

    def __init__(
        self, workspace: Workspace, session: Session, engines: Engines, references: Sequence[Reference]
    ) -> None:
        from pfstorer_rt.degradation.degrade import degrade
        from pfstorer_rt.training.data import center_crop

        self.workspace, self.session, self.engines = workspace, session, engines
        used = [reference for reference in references if not reference.left_out] or list(references)
        photo = center_crop(used[0].photo, engines.base().config.tile)
        self.degraded: Pixels = np.ascontiguousarray(degrade(photo, "heavy", 0).clamp(0, 1).permute(1, 2, 0).numpy())
        self.first = [
            self.write("preview_photo", np.ascontiguousarray(photo.permute(1, 2, 0).numpy())),
            self.write("preview_input", self.degraded),
        ]

    def after(self, iteration: int, identity: Identity) -> list[str]:
        """Return the addresses of photograph, degraded photograph and restoration."""
        with Restorer.from_base(self.engines.base(), identity) as restorer:
            restored = restorer.restore(self.degraded)
        return [*self.first, self.write(f"preview_{iteration}", restored)]

    def write(self, name: str, pixels: Pixels) -> str:
        """Write a picture; returns its address."""
        target = self.session.folder / f"{name}.png"
        save_image(target, pixels, overwrite=True)
        return self.workspace.publish(target)


def known_people(engines: Engines) -> list[Known]:
    """Return the identities of the data directory, and the interrupted trainings."""
    found = []
    for path in list_identities():
        try:
            identity = Identity.load(path, tensors=False)
        except PFStorerError as error:
            found.append(Known(path.stem, str(error)))
            continue
        photographs = len(identity.references)
        text = f"learned from {photographs} photograph{'s' if photographs > 1 else ''}"
        if identity.base_fingerprint != engines.fingerprint:
            text += f" on another base, {identity.base_name}"
        found.append(Known(path.stem, text))
    names = {person.name for person in found}
    text = "the training was cancelled; learn the same photographs to resume it"
    return found + [Known(name, text, False) for name in list_unfinished() if name not in names]


def rename(name: str | None, new: str) -> str:
    """Rename a person; returns a sentence."""
    old = chosen(name)
    rename_identity(old, new.strip())
    return f"{old} is now named {new.strip()}."


def delete(name: str | None, confirmation: str) -> str:
    """Delete every file of a person for good; returns a sentence. The name must be typed as a confirmation."""
    person = chosen(name)
    if confirmation.strip() != person:
        raise SettingError(f"type the name {person} to delete this person; nothing was deleted")
    count = len(delete_identity(person).files)
    return f"{person} is deleted ({count} file{'s' if count > 1 else ''}). Plans that you exported yourself are left."


def export_file(workspace: Workspace, session: Session, name: str | None) -> str:
    """Return the address of a copy of an identity file; the copy of an encrypted file is encrypted."""
    person = chosen(name)
    folder = session.folder / "export"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = named_identity(person)
    return workspace.publish(Identity.load(path).save(folder / path.name, passphrase_of(path)))


def import_file(workspace: Workspace, session: Session, file: str | None, name: str = "") -> str:
    """Store a dropped identity file; returns a sentence. Raises `PFStorerError` for a file that is not an identity."""
    if not file:
        raise SettingError("no file: drop an identity file (.safetensors)")
    (path,) = workspace.take([file], session.folder / "import", 1)
    try:
        identity = import_identity(path, name.strip() or None)
    finally:
        path.unlink(missing_ok=True)
    return f"{identity.name} is stored on this machine."


def chosen(name: str | None) -> str:
    """Return the chosen name; raises `SettingError` when nobody is chosen."""
    if not name:
        raise SettingError("nobody is chosen: choose a person first")
    return name
