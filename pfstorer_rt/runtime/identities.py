"""Check, rename, import and delete the identities of the user's data directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pfstorer_rt.encryption import passphrase_of_user, seal
from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError
from pfstorer_rt.files import (
    atomic_write,
    cache_home,
    keeps_modes,
    real_path,
    remove_leftovers,
    sha256_file,
    show_path,
)
from pfstorer_rt.identity import (
    Identity,
    identities_dir,
    identity_path,
    is_encrypted,
    kept_plan,
    named_identity,
    no_such_identity,
    read_content,
    read_metadata,
    training_files,
)
from pfstorer_rt.imaging.find import find_images


@dataclass(frozen=True)
class Check:
    """One statement about an identity, and whether it is true."""

    passed: bool
    text: str


def verify_identity(name: str | Path, photographs: Sequence[Path] = ()) -> list[Check]:
    """Check that a file is complete and private, that its base is present, and which photographs it was trained on.

    name: a name or a file. photographs: files or folders; each image gets a check whether the identity was trained on
    it. The other private files of the identity on this machine are listed. Raises `BadFileError` when the file cannot
    be read.
    """
    path = identity_path(name)
    if not path.is_file() and (left := find_kept(name).files):  # raises where nothing is left
        advice = "finish its training with `personalize`, or delete it with `identities rm`"
        return [Check(False, f"no identity, but a part is left: {show_path(file)}; {advice}") for file in left]
    identity = Identity.load(path)
    finite = all(bool(t.isfinite().all()) for t in identity.tensors.values() if t.is_floating_point())
    checks = [
        Check(bool(identity.tensors) and finite, f"{len(identity.tensors)} tensors, all finite"),
        _check_mode(path),
        _check_base(identity),
    ]
    others = [kept for kept in find_kept(path).files if kept != path]
    checks += [Check(True, f"also on this machine: {show_path(kept)}") for kept in others]
    images = find_images(photographs) if photographs else []
    return checks + [_check_photograph(photograph, identity) for photograph in images]


def _check_photograph(path: Path, identity: Identity) -> Check:
    """Check that an identity was learned from a photograph."""
    if sha256_file(path) in identity.references:
        return Check(True, f"learned from {show_path(path)}")
    return Check(False, f"not learned from {show_path(path)}: it was left out, changed, or added later")


def _check_mode(path: Path) -> Check:
    """Check that only the owner can read a file, where the file system has owners."""
    if path.stat().st_mode & 0o077 == 0:
        return Check(True, "readable by its owner only")
    try:
        private = keeps_modes(path.parent)
    except OSError:
        private = True
    if private:
        return Check(False, "readable by its owner only")
    where = "the permissions of its folder apply" if os.name == "nt" else "everybody who can read this disk can read it"
    return Check(True, f"its file system has no owner-only files: {where}")


def _check_base(identity: Identity) -> Check:
    from pfstorer_rt.base_files import find_base, fingerprint_directory

    try:
        found = fingerprint_directory(find_base(identity.base_name))
    except PFStorerError as error:
        return Check(False, str(error))
    text = f"base {identity.base_name} is present, and the identity was learned on it"
    return Check(found == identity.base_fingerprint, text)


def check_plain(name: str | Path) -> Path:
    """Return the file of an identity that is complete and not encrypted.

    Raises `SettingError` if it is encrypted, and as `Identity.load`.
    """
    path = identity_path(name)
    if is_encrypted(path):
        raise SettingError(f"{show_path(path)}: encrypted already; decrypt it first to change the passphrase")
    Identity.load(path)
    return path


def check_encrypted(name: str | Path) -> tuple[Path, bytes]:
    """Return the file of an encrypted identity and its decrypted content.

    Raises `SettingError` if it is not encrypted, `BadFileError` for another passphrase.
    """
    path = identity_path(name)
    content = read_content(path)
    if content is None:
        raise SettingError(f"{show_path(path)}: not encrypted; nothing was changed")
    return path, content


def encrypt_identity(name: str | Path, passphrase: str) -> None:
    """Encrypt the file of an identity; delete the studio's plan and compiled networks, which are not encrypted.

    Raises the errors of `check_plain`.
    """
    path = check_plain(name)
    networks, _ = _compiled_networks(path)
    _replace(path, seal(path.read_bytes(), passphrase))
    for folder in networks:
        shutil.rmtree(folder)
    if _is_named(path):
        kept_plan(path).unlink(missing_ok=True)


def decrypt_identity(name: str | Path) -> None:
    """Decrypt the file of an identity with the user's passphrase.

    Raises the errors of `check_encrypted`.
    """
    path, content = check_encrypted(name)
    _replace(path, content)


def passphrase_of(path: Path) -> str | None:
    """Return the user's passphrase for an encrypted file, so that a copy is encrypted too; None for another file."""
    return passphrase_of_user() if is_encrypted(path) else None


def _replace(path: Path, data: bytes) -> None:
    with atomic_write(path, mode=0o600) as file:
        file.write(data)


@dataclass(frozen=True)
class Kept:
    """All files of an identity on this machine."""

    files: tuple[Path, ...]
    """Files and folders. The identity is the last, because finding the others after an interruption needs it."""
    notes: tuple[str, ...] = ()
    """Notes on files that may exist but cannot be found."""


def find_kept(name: str | Path) -> Kept:
    """Find the file of an identity, an interrupted training, the plan of the studio, and compiled networks.

    Raises `BadFileError` when there are no files, and for a file outside the data directory that is not an identity.
    """
    path = identity_path(name)
    checkpoint, crops = training_files(path)
    named = _is_named(path)  # other folders can contain files of other programs
    if path.is_file() and not named:
        read_metadata(path, read_content(path))
    present = [checkpoint] if checkpoint.is_file() and (named or _is_checkpoint(checkpoint)) else []
    present += [crops] if crops.is_dir() and (named or _is_crops(crops)) else []
    present += [kept_plan(path)] if named and kept_plan(path).is_file() else []
    present += [path] if path.is_file() or (named and path.is_symlink()) else []  # a link may lead nowhere
    if not present:
        raise BadFileError(no_such_identity(path))
    networks, notes = _compiled_networks(path)
    return Kept((*networks, *present), notes)


def delete_identity(name: str | Path) -> Kept:
    """Delete all files of an identity and return them; raises the errors of `find_kept`."""
    kept = find_kept(name)
    for path in kept.files:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    remove_leftovers(kept.files[-1].parent)
    return kept


def _is_named(path: Path) -> bool:
    """Whether the file of an identity is in the data directory, by any spelling of its path."""
    return real_path(path.parent) == real_path(identities_dir())


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is the state of an interrupted training, as `TrainState.save` writes it."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch.load raises many types for other files
        return False
    return isinstance(state, dict) and {"iteration", "signature", "parameters"} <= state.keys()


def _is_crops(folder: Path) -> bool:
    """Whether a folder contains the crops of an interrupted training and nothing else."""
    names = {file.name for file in folder.iterdir()}
    return names <= {"crops.json", "latents.npy", "images.npy", "maps.npy"}


def _compiled_networks(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the folders in which engines keep compiled networks of this identity, and notes.

    Returns no folders and a note for a file that cannot be read, and for a file whose tensors do not match the
    fingerprint in its metadata, because it could name the networks of another identity.
    """
    from pfstorer_rt.engine.compiled import ENGINES, cache_folder

    try:
        fingerprint = Identity.load(path).fingerprint
    except (PFStorerError, ValueError):
        fingerprint = ""
    folders, notes = [], []
    for engine in ENGINES:
        try:
            folders.append(cache_folder(engine, fingerprint))
        except ValueError:  # the fingerprint is unknown, or a symbolic link leads out of the cache directory
            compiled = cache_home() / engine
            if path.is_file() and compiled.is_dir():
                notes.append(
                    f"compiled networks of {show_path(path)} may be left in {show_path(compiled)}, because its "
                    "fingerprint is unknown; that folder can be deleted at any time"
                )
    return [folder for folder in folders if folder.is_dir()], tuple(notes)


def rename_identity(name: str, new: str) -> Identity:
    """Give an identity of the user's data directory another name; returns it. An encrypted file stays encrypted.

    Raises `ValueError` for an invalid name, `BadFileError` for a file that cannot be read, and `PFStorerError` when an
    identity has the new name already. An interrupted training must be finished or deleted first.
    """
    path, target = named_identity(name), named_identity(new)
    identity = Identity.load(path)
    if any(file.exists() for file in training_files(path)):
        raise PFStorerError(f"{name}: its training is not finished; finish or delete it before you rename it")
    _check_free(target)
    identity.name = new
    identity.save(target, passphrase_of(path))
    kept_plan(path).unlink(missing_ok=True)  # it contains the old name
    path.unlink()
    return identity


def import_identity(file: Path, name: str | None = None) -> Identity:
    """Copy an identity file into the user's data directory; returns the identity. An encrypted file stays encrypted.

    name: name on this machine; None keeps its own name. Raises `BadFileError` for a file that is not a complete
    identity, `ValueError` for an invalid name, and `PFStorerError` when an identity has this name already.
    """
    identity = Identity.load(file)
    identity.name = name or identity.name
    target = named_identity(identity.name)
    _check_free(target)
    identity.save(target, passphrase_of(file))
    return identity


def _check_free(path: Path) -> None:
    """Raise `PFStorerError` if a named identity, or an interrupted training of it, exists."""
    if path.exists() or any(file.exists() for file in training_files(path)):
        raise PFStorerError(f"{path.stem}: this name is used already; choose another one", setting="overwrite")
