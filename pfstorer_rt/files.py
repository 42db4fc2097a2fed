"""Whole files or none: where they are kept, atomic writing, and the digests that artefacts name each other by."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import platformdirs

from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError
from pfstorer_rt.temporary import KEPT, sweep, sweep_once, temporary_file, temporary_folder

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # bytes read at once by sha256_file
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "create its folder first",
    errno.ENOTDIR: "a part of its path is a file; choose a name inside a folder",
    errno.EISDIR: "it is a folder; choose a file name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def home() -> Path:
    """Return the user's data directory; the environment variable PFSTORER_HOME overrides it."""
    override = os.environ.get("PFSTORER_HOME")
    return Path(override) if override else Path(platformdirs.user_data_dir("pfstorer-rt", appauthor=False))


def cache_home() -> Path:
    """Return the user's cache directory, whose files can be deleted at any time; under PFSTORER_HOME where set."""
    override = os.environ.get("PFSTORER_HOME")
    return Path(override) / "cache" if override else Path(platformdirs.user_cache_dir("pfstorer-rt", appauthor=False))


def is_fingerprint(value: object) -> bool:
    """Whether a value is a fingerprint: a string of 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _FINGERPRINT.fullmatch(value) is not None


def check_fingerprint(value: object, owner: str) -> str:
    """Return a fingerprint that was read from a file; raises `ValueError` for anything but 64 hexadecimal digits.

    owner: what the fingerprint belongs to, for the message.
    """
    if not is_fingerprint(value):
        raise SettingError(f"fingerprint of the {owner} {str(value)[:80]!r}, expected 64 hexadecimal digits")
    return str(value)


def is_name(value: object) -> bool:
    """Whether a value is a plain name: 1-64 of a-z, A-Z, 0-9, '_', '-' and '.', the first a letter or a digit."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def inside(root: Path, *names: str) -> Path:
    """Return the path of an entry below a folder of this project's own, such as the cache directory.

    Every path below these folders that depends on the content of a file is made here. Raises `ValueError` for a name
    that is not plain (`is_name`), and for an entry that a symbolic link leads out of the folder.
    """
    path = root.joinpath(*names)
    if not all(map(is_name, names)) or not path.resolve().is_relative_to(root.resolve()):
        raise SettingError(f"{show_path(path)}: leads out of {show_path(root)}")
    return path


def show_path(path: str | os.PathLike[str]) -> str:
    """Spell a path on one line, so that a message with it can always be printed.

    Returns the path itself, or its `repr` where it holds line breaks or bytes that are not text.
    """
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[BinaryIO]:
    """Write a file so that its name holds the old bytes or all of the new ones, never a part.

    Yields a binary file under a temporary name in the target's folder. Leaving the block normally
    flushes, fsyncs and renames it; any exception, KeyboardInterrupt included, removes it and leaves
    an existing target as it was. A symbolic link is followed.
    mode: permission bits, set before the first byte is written (0o600 for biometric data); None
    leaves them to the umask.
    Raises PFStorerError where the file cannot be written. An OSError about another file, raised
    inside the block, is passed on as it is.
    """
    target = Path(os.path.realpath(path))
    try:
        _refuse_special(target)
        sweep_once(target.parent)
        temporary, descriptor = temporary_file(target.parent, mode)
    except OSError as error:
        raise _write_error(path, error) from error
    handle = os.fdopen(descriptor, "wb")
    try:
        yield handle
        handle.flush()
        os.fsync(handle.fileno())
        if os.name == "nt":  # an open file cannot be renamed there; elsewhere its lock keeps it from being swept
            handle.close()
        os.replace(temporary, target)
        handle.close()
    except BaseException as error:
        _discard(temporary, handle)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise _write_error(path, error) from error
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def work_folder(near: Path | None = None) -> Iterator[Path]:
    """Make an owner-only folder for the length of the block, in the cache directory.

    near: a folder into which results are moved afterwards. Where it is on another file system than the cache
    directory, the work folder is made in it, so that a file can be renamed into its place.
    Where the cache directory cannot be written, the work folder is made in `near`, or else among the system's
    temporary files. Raises PFStorerError where the folder cannot be made.
    """
    parent = _work_parent(near)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(parent))
        except OSError as error:
            raise _write_error(parent, error) from error
        yield folder


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder and in the cache directory."""
    sweep(folder)
    sweep(cache_home() / "work")


def _work_parent(near: Path | None) -> Path:
    try:
        parent = make_folder(cache_home() / "work")
    except PFStorerError:
        return near or Path(tempfile.gettempdir())
    other_disk = near is not None and _device(near) != _device(parent)
    return parent if os.access(parent, os.W_OK) and not other_disk else near or Path(tempfile.gettempdir())


def move_file(source: Path, target: str | os.PathLike[str]) -> None:
    """Give a finished file another name on the same file system; what had that name is replaced.

    A symbolic link is followed. Raises PFStorerError where the name cannot be given.
    """
    place = Path(os.path.realpath(target))
    try:
        _refuse_special(place)
        os.replace(source, place)
    except OSError as error:
        raise _write_error(target, error) from error
    _sync_folder(place.parent)


@contextlib.contextmanager
def atomic_entries(path: Path, names: Sequence[str]) -> Iterator[Path]:
    """Write some entries of a folder so that it holds the old ones or all of the new ones, never a mixture.

    Yields an empty folder inside of it, so that all is on one file system. Leaving the block normally fsyncs what was
    written there and moves it up; entries in `names` that were not written are removed, all others stay. The first of
    `names` is taken away first and comes back last: it marks a folder as whole, should the process be killed meanwhile.
    Any exception, KeyboardInterrupt included, leaves the folder as it was.
    Raises PFStorerError where the folder cannot be written.
    """
    existed = path.is_dir()
    with contextlib.ExitStack() as stack:
        if not existed:
            stack.callback(_remove_empty, path)
        try:
            temporary = stack.enter_context(temporary_folder(make_folder(path)))
        except OSError as error:
            raise _write_error(path, error) from error
        new, old = temporary / "new", temporary / KEPT
        try:
            new.mkdir()
            old.mkdir()
            yield new
            _exchange(path, new, old, names)
        except OSError as error:
            if error.filename is None or str(error.filename).startswith(str(temporary)):
                raise _write_error(path, error) from error
            raise
    _sync_folder(path)


def check_space(path: Path, needed: int) -> None:
    """Raise PFStorerError where a folder, which need not exist yet, is on a disk with less than `needed` bytes free."""
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PFStorerError(
            f"{show_path(path)}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; free some space or "
            "choose another folder"
        )


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """Digest bytes: 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Digest a file without holding it in memory: 64 lower-case hexadecimal digits.

    Raises BadFileError where the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{show_path(path)}: cannot be read ({reason}); check the path and its permissions"
        raise BadFileError(message) from error
    return digest.hexdigest()


def fingerprint_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash names, types and bytes in the order given: 64 lower-case hexadecimal digits."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + b"\0" + str(tensor.dtype).encode() + b"\0")
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _device(folder: Path) -> int:
    return folder.stat().st_dev


def _refuse_special(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # os.replace would put a plain file in the place of /dev/null, or of a pipe that others read.
    if target.exists() and not target.is_file():
        raise PFStorerError(f"{show_path(target)}: not a plain file; choose another output name")


def _discard(temporary: Path, handle: BinaryIO) -> None:
    # Closing flushes, which fails again on a full disk; the first error is the one to report.
    with contextlib.suppress(OSError, ValueError):
        handle.close()
    with contextlib.suppress(OSError):
        temporary.unlink()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: all went well
        folder.rmdir()


def _exchange(path: Path, new: Path, old: Path, names: Sequence[str]) -> None:
    for file in (file for file in new.rglob("*") if file.is_file()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    with contextlib.ExitStack() as undo:  # only if not all of it succeeds
        for name in (name for name in names if os.path.lexists(path / name)):
            os.rename(path / name, old / name)
            undo.callback(os.rename, old / name, path / name)
        for name in (name for name in reversed(names) if (new / name).exists()):
            os.rename(new / name, path / name)
            undo.callback(os.rename, path / name, new / name)
        undo.pop_all()


def _sync_folder(folder: Path) -> None:
    # The rename is on disk only when the folder is. Windows cannot open folders; nor can some mounts sync.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_error(path: str | os.PathLike[str], error: OSError) -> PFStorerError:
    reason = (error.strerror or str(error)).lower()
    advice = _ADVICE.get(error.errno or 0, "check the path and the disk")
    return PFStorerError(f"{show_path(path)}: cannot be written ({reason}); {advice}")


def make_folder(path: Path, private: bool = False) -> Path:
    """Make a folder and those above it; returns it. Raises PFStorerError where it cannot be made.

    private: for the owner alone, whatever the umask; an existing folder keeps its mode. Folders in the data and cache
    directories always are: in a folder that others may write to, they could replace an identity or the signing key.
    """
    private = private or any(path.is_relative_to(root) for root in (home(), cache_home()))
    mode = 0o700 if private else 0o777
    try:
        for folder in reversed((path, *path.parents)):  # the mode of `mkdir(parents=True)` is for the last one alone
            if folder == path or not folder.exists():
                folder.mkdir(mode, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PFStorerError(f"{show_path(path)}: this folder cannot be made ({reason}); choose another one") from error
    return path
