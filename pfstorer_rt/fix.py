"""Restore images of a person in one call: find or learn the identity, restore, and write comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import sha256_file, work_folder
from pfstorer_rt.identity import Identity, is_encrypted, list_identities
from pfstorer_rt.imaging.find import find_images, without_results
from pfstorer_rt.plan import DEFAULT_BASE
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.runtime.batch import (
    BatchConfig,
    OnOutcome,
    OnStep,
    Outcome,
    check_beside,
    engine_notes,
    restore_jobs,
    without_work,
)
from pfstorer_rt.runtime.jobs import Job, plan_jobs
from pfstorer_rt.runtime.recipe import check_strength
from pfstorer_rt.runtime.restorer import Restorer

if TYPE_CHECKING:
    from pfstorer_rt.models.base import Base

BRIEF = 30
"""Iterations in which a person is learned on a base whose prior is the start of a training."""


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
    on_progress: OnProgress = ignore_progress,
) -> list[Outcome]:
    """Restore images of a person.

    inputs, output: as in `plan_jobs`. person: folder of photographs of the person. A stored identity that was learned
    from these photographs is used. Otherwise the person is learned as the prior of the base allows, and the identity is
    not stored; a base without a prior restores without an identity. note: called with a line about the identity, for
    inputs that are passed over, and for each unsuitable photograph. on_progress: for the learning. Nothing is learned
    if no image can be restored. Raises `BadFileError` when no photograph can be read, and the errors of `find_work`,
    before any work.
    """
    config = config or FixConfig()
    jobs, done = find_work(inputs, output, config.batch, on_outcome, note)
    if done:
        return done
    with restorer_for(person, config, note, on_progress) as restorer:
        for text in engine_notes(restorer, config.batch):
            note(text)
        return restore_jobs(restorer, jobs, config.batch, on_outcome, on_step)


def find_work(
    inputs: Sequence[str | Path],
    output: str | Path | None,
    batch: BatchConfig,
    on_outcome: OnOutcome,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[list[Job], list[Outcome]]:
    """Return the jobs, and their outcomes if no image can be restored, which are reported.

    Learning takes time, so this comes before it. note: called with a line for files that are passed over. Raises
    the errors of `plan_jobs`, and `SettingError` for a strength out of range.
    """
    check_strength(batch.restore.strength)
    jobs = plan_jobs(inputs, output, batch.naming, note, batch.saving.overwrite)
    check_beside(jobs, batch)
    done = without_work(jobs, batch)
    for outcome in done:
        on_outcome(outcome)
    return jobs, done


def restorer_for(
    person: Path,
    config: FixConfig,
    note: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress = ignore_progress,
) -> Restorer:
    """Return a restorer with the identity of the photographs in a folder; arguments as in `fix`."""
    with needed_by("fix", "train"):
        from pfstorer_rt.models.base import load_base

        base = load_base(config.base)
        return Restorer.from_base(base, identity_of(person, base, note, on_progress))


def identity_of(
    person: Path,
    base: Base,
    note: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress = ignore_progress,
) -> Identity | None:
    """Return the stored identity of the photographs in a folder, or learn it.

    With an instant prior, a person is learned without training, and with another prior in `BRIEF` iterations. Returns
    None, with a note, when there is no stored identity and the base has no prior.
    """
    from pfstorer_rt.training.personalize import instant_identity

    photos = without_results(find_images([person], note), note)
    if found := stored_identity(photos, base, note):
        note(f"identity {found.name}: learned from these photographs before{iterations_of(found)}")
        return found
    if base.instant:
        return instant_identity("person", photos, base, note=note)
    if base.prior is None:
        note(
            f"base {base.config.name} has no prior, so the person is not learned here; the images are restored without "
            "an identity. Learn the person once with `personalize`; then it is used here"
        )
        return None
    return brief_identity(photos, base, note, on_progress)


def brief_identity(
    photos: Sequence[Path], base: Base, note: Callable[[str], None], on_progress: OnProgress
) -> Identity:
    """Learn a person in `BRIEF` iterations, or in those of the base if they are fewer."""
    from pfstorer_rt.config import PersonalizeConfig
    from pfstorer_rt.training.personalize import personalize

    config = PersonalizeConfig.for_base(base.config)
    config = config.longer(min(1.0, BRIEF / config.train.iterations))
    note(
        f"the person is learned in {config.train.iterations} iterations, and the identity is not stored; to train "
        "longer and store it, use `personalize` first: `fix` then uses its identity"
    )
    with work_folder() as folder:
        return personalize("person", photos, base, config, folder / "person.safetensors", note, on_progress)


def iterations_of(identity: Identity) -> str:
    """Return the end of a sentence with the iterations of a training; empty if the settings do not state them."""
    count = iterations(identity)
    return "" if count is None else f", in {count} iteration{'' if count == 1 else 's'}"


def iterations(identity: Identity) -> int | None:
    """Return the iterations of the training of an identity; None if the settings do not state them."""
    train = identity.settings.get("train")
    count = train.get("iterations") if isinstance(train, dict) else None
    return count if isinstance(count, int) else None


def stored_identity(
    photos: Sequence[Path], base: Base, note: Callable[[str], None] = lambda _: None
) -> Identity | None:
    """Return the identity in the user's data directory that was learned on a base from exactly these photographs.

    Among several, the one with the longest training.
    Photographs that learning leaves out may be among `photos`, whether the identity was learned from them or not.
    note: called with a line for each encrypted identity that cannot be opened.
    """
    from pfstorer_rt.config import PersonalizeConfig
    from pfstorer_rt.training.personalize import choose_references

    digests = {path: sha256_file(path) for path in photos}
    wanted = set(digests.values())
    candidates = {file: set(known) for file, known in _stored(base.fingerprint, note) if set(known) <= wanted}
    if candidates and wanted not in candidates.values():  # finding the faces takes seconds
        used, _ = choose_references(photos, base, PersonalizeConfig.for_base(base.config))
        wanted = {digests[path] for path in used}
    found = []
    for file in (file for file, known in candidates.items() if known == wanted):
        with suppress(BadFileError):  # its tensors are damaged
            found.append(Identity.load(file))
    return max(found, key=lambda identity: iterations(identity) or 0, default=None)


def _stored(base_fingerprint: str, note: Callable[[str], None]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield the files of the identities in the user's data directory that belong to a base, and their references."""
    for file in list_identities():
        try:
            identity = Identity.load(file, tensors=False)
        except BadFileError:  # `identities verify` reports damaged files
            with suppress(BadFileError):
                if is_encrypted(file):
                    note(
                        f"identity {file.stem} is encrypted and was not compared with the photographs; if it is this "
                        "person, set PFSTORER_PASSPHRASE to its passphrase"
                    )
            continue
        if identity.base_fingerprint == base_fingerprint:
            yield file, identity.references
