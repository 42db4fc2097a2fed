"""Restore images of a person in one call: learn the person without training, restore, and write comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import sha256_file
from pfstorer_rt.identity import Identity, identities_dir
from pfstorer_rt.imaging.find import find_images, without_results
from pfstorer_rt.plan import DEFAULT_BASE
from pfstorer_rt.runtime.batch import BatchConfig, OnOutcome, OnStep, Outcome, restore_files
from pfstorer_rt.runtime.restorer import Restorer

if TYPE_CHECKING:
    from pfstorer_rt.models.base import Base


@dataclass(frozen=True)
class FixConfig:
    """Settings of `fix`."""

    base: str | Path = DEFAULT_BASE
    """Name of a shipped base, or a base directory."""
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(compare=True))


def fix(
    inputs: Sequence[str | Path],
    person: Path,
    output: str | Path | None = None,
    config: FixConfig | None = None,
    note: Callable[[str], None] = lambda _: None,
    on_outcome: OnOutcome = lambda _: None,
    on_step: OnStep = lambda *_: None,
) -> list[Outcome]:
    """Restore images of a person.

    inputs, output: as in `plan_jobs`. person: folder of photographs of the person. A stored identity that was learned
    from these photographs is used; otherwise the person is learned without training, and nothing is stored. note:
    called with a line about the identity and for each unsuitable photograph.
    Raises `BadFileError` when a photograph cannot be read, `ValueError` for a base without a prior, before any work.
    """
    config = config or FixConfig()
    with needed_by("fix", "train"):
        from pfstorer_rt.models.base import load_base

        base = load_base(config.base)
        identity = identity_of(person, base, note)
    with Restorer.from_base(base, identity) as restorer:
        return restore_files(restorer, inputs, output, config.batch, on_outcome, on_step)


def identity_of(person: Path, base: Base, note: Callable[[str], None] = lambda _: None) -> Identity:
    """Return the stored identity that was learned from the photographs in a folder, or learn it without training."""
    from pfstorer_rt.training.personalize import instant_identity

    photos = without_results(find_images([person], note), note)
    if found := stored_identity(photos, base.fingerprint):
        note(f"identity {found.name}: learned from these photographs before")
        return found
    return instant_identity("person", photos, base, note=note)


def identity_of_references(
    folder: str | Path, base: Base, note: Callable[[str], None] = lambda _: None
) -> Identity | None:
    """Return the identity of the person in a folder as `identity_of`; None with a base that has no prior."""
    return None if base.prior is None else identity_of(Path(folder), base, note)


def stored_identity(photos: Sequence[Path], base_fingerprint: str) -> Identity | None:
    """Return the identity in the user's data directory that was learned from exactly these photographs on a base."""
    wanted = {sha256_file(path) for path in photos}
    for file in sorted(identities_dir().glob("*.safetensors")):
        try:
            identity = Identity.load(file, tensors=False)
            if set(identity.references) == wanted and identity.base_fingerprint == base_fingerprint:
                return Identity.load(file)
        except BadFileError:  # `identities verify` reports damaged files
            continue
    return None
