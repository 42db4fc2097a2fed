"""Data and cache directories, atomic writing, and the digests that identify files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import platformdirs

from pfstorer_rt.errors import BadFileError, ExistsError, PFStorerError, SettingError
from pfstorer_rt.temporary import KEPT, sweep, sweep_once, temporary_file, temporary_folder

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # bytes per read in sha256_file
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_NUMPY_WRITE = re.compile(r"\d+ requested and \d+ written")
"""Message of `ndarray.tofile` for a full disk, an OSError without a number."""

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
    """Return the user's cache directory, inside PFSTORER_HOME if it is set. Its files can be deleted at any time."""
    override = os.environ.get("PFSTORER_HOME")
    return Path(override) / "cache" if override else Path(platformdirs.user_cache_dir("pfstorer-rt", appauthor=False))


def graph_folder() -> Path:
    """Return the folder in the cache directory where exports keep traced graphs."""
    return cache_home() / "graphs"


def is_fingerprint(value: object) -> bool:
    """Whether a value is a fingerprint: a string of 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _FINGERPRINT.fullmatch(value) is not None


def check_fingerprint(value: object, owner: str) -> str:
    """Return a fingerprint that was read from a file; raises `ValueError` unless it is 64 hexadecimal digits.

    owner: subject of the error message.
    """
    if not is_fingerprint(value):
        raise SettingError(f"fingerprint of the {owner} {str(value)[:80]!r}, expected 64 hexadecimal digits")
    return str(value)


def is_name(value: object) -> bool:
    """Whether a value is a plain name: 1-64 of a-z, A-Z, 0-9, '_', '-' and '.', starting with a letter or digit."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def inside(root: Path, *names: str) -> Path:
    """Return the path of an entry in a folder of this project, such as the cache directory.

    Use this function for every path that depends on the content of a file. Raises `ValueError` if a name is not plain
    (`is_name`) or a symbolic link leads outside the folder.
    """
    path = root.joinpath(*names)
    if not all(map(is_name, names)) or not real_path(path).is_relative_to(real_path(root)):
        raise SettingError(f"{show_path(path)}: leads out of {show_path(root)}")
    return path


def real_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file without links; unlike `Path.resolve`, it accepts a link to itself."""
    return Path(os.path.realpath(path))


def show_path(path: str | os.PathLike[str]) -> str:
    """Return a path as one printable line, for messages.

    Returns the path itself, or its `repr` if it contains line breaks or bytes that are not text.
    """
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: int | None = None, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Write a file atomically: the target has either its old content or the complete new content.

    Yields a binary file with a temporary name in the folder of the target. A normal exit from the block flushes,
    fsyncs and renames the file. Any exception, including KeyboardInterrupt, removes the file and leaves an existing
    target unchanged. Symbolic links are followed.
    mode: permission bits, set before the first write (0o600 for biometric data); None uses the umask.
    overwrite: whether an existing target is replaced; if not, a target that another process writes meanwhile stays too.
    Raises ExistsError for a target that may not be replaced, and PFStorerError if it cannot be written. An OSError
    about another file inside the block propagates unchanged.
    """
    target = real_path(path)
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
        if os.name == "nt":  # Windows cannot rename open files; elsewhere an open file stays locked
            handle.close()
        _publish(temporary, target, overwrite)
        handle.close()
    except BaseException as error:
        _discard(temporary, handle)
        failure = _os_error(error)
        if failure and failure.filename in (None, str(temporary)):
            raise _write_error(path, failure) from error
        raise
    _sync_folder(target.parent)


def check_target(path: Path) -> None:
    """Raise PFStorerError if a file cannot be made in its folder: for a check before long work."""
    try:
        os.lstat(path)  # fails for a name that is too long
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _write_error(path, error) from error
    folder = real_path(path).parent  # the path may be a link to a file in another folder
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise _write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


@contextlib.contextmanager
def work_folder(near: Path | None = None) -> Iterator[Path]:
    """Make a temporary owner-only folder in the cache directory; the end of the block removes it.

    near: the folder to which the caller moves the results. If it is on another file system than the cache directory,
    the work folder is made in `near`, so that files can be renamed.
    If the cache directory is not writable, the work folder is made in `near`, or else in the system's temporary
    directory. Raises PFStorerError if the folder cannot be made.
    """
    parent = _work_parent(near)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(parent))
        except OSError as error:
            raise _write_error(parent, error) from error
        try:
            yield folder
        except OSError as error:
            if _NUMPY_WRITE.fullmatch(str(error)):
                raise _write_error(parent, error) from error
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder and from the cache directory."""
    sweep(folder)
    sweep(cache_home() / "work")


def system_folder() -> Path:
    """Return the system's folder of temporary files: TMPDIR, if it is set.

    Raises `PFStorerError` if TMPDIR is not a writable folder, where Python would use another folder.
    """
    named = os.environ.get("TMPDIR")
    if named and not (os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)):
        raise PFStorerError(
            f"TMPDIR is {named!r}, expected a folder that you may write to; create it, or set TMPDIR to another one"
        )
    return Path(tempfile.gettempdir())


def _work_parent(near: Path | None) -> Path:
    try:
        parent = make_folder(cache_home() / "work")
    except PFStorerError:
        return near or system_folder()
    other_disk = near is not None and _device(near) != _device(parent)
    return parent if os.access(parent, os.W_OK) and not other_disk else near or system_folder()


def move_file(source: Path, target: str | os.PathLike[str]) -> None:
    """Rename a finished file within the same file system, replacing the target.

    Symbolic links are followed. Raises PFStorerError if the file cannot be renamed.
    """
    place = real_path(target)
    try:
        _refuse_special(place)
        os.replace(source, place)
    except OSError as error:
        raise _write_error(target, error) from error
    _sync_folder(place.parent)


@contextlib.contextmanager
def atomic_entries(path: Path, names: Sequence[str]) -> Iterator[Path]:
    """Replace entries of a folder together: the folder has either all old entries or all new entries.

    Yields an empty folder inside `path`, on the same file system. A normal exit from the block fsyncs the new entries
    and moves them to `path`. Entries in `names` that were not written are removed; other entries stay. The first of
    `names` is removed first and moved last. If the process is killed meanwhile, the missing entry shows that the
    folder is incomplete.
    Any exception, including KeyboardInterrupt, leaves the folder unchanged.
    Raises PFStorerError if the folder cannot be written.
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


def keeps_modes(folder: Path) -> bool:
    """Whether files in a folder can be private to their owner: false on Windows, and on exFAT and similar disks.

    Raises OSError if no file can be made there.
    """
    if os.name == "nt":
        return False
    path, descriptor = temporary_file(folder, 0o600)
    try:
        return os.fstat(descriptor).st_mode & 0o077 == 0
    finally:
        path.unlink()
        os.close(descriptor)


def check_space(path: Path, needed: int) -> None:
    """Raise PFStorerError if the disk of a folder has less than `needed` bytes free. The folder need not exist."""
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PFStorerError(
            f"{show_path(path)}: {math.ceil(needed / 1e6)} MB are needed, {free // 10**6} MB are free; "
            "free some space or choose another folder"
        )


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain file for reading.

    Raises `BadFileError` for a pipe or a device, which could block for ever, and OSError as `open` does.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.fdopen(os.open(path, flags), "rb")  # raises IsADirectoryError for a folder
    if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        return handle
    handle.close()
    raise BadFileError(f"{show_path(path)}: a pipe or a device; expected a plain file: copy its content to a file")


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of bytes: 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, read in chunks: 64 lower-case hexadecimal digits.

    Raises BadFileError if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_plain(path) as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{show_path(path)}: cannot be read ({reason}); check the path and its permissions"
        raise BadFileError(message) from error
    return digest.hexdigest()


def fingerprint_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of names, types and bytes in the given order: 64 lower-case hexadecimal digits."""
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
    # os.replace would replace /dev/null, or a pipe with readers, by a plain file.
    if target.exists() and not target.is_file():
        raise PFStorerError(f"{show_path(target)}: not a plain file; choose another output name")


def exists_already(path: str | os.PathLike[str]) -> ExistsError:
    """Return the error for an existing file that may not be replaced."""
    return ExistsError(
        f"{show_path(path)}: exists already; choose another name or allow overwriting", setting="overwrite"
    )


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give a finished file its name."""
    if not overwrite:
        try:
            os.link(temporary, target)  # fails if the target exists
        except FileExistsError:
            raise exists_already(target) from None
        except OSError:  # a file system without hard links, such as exFAT
            if os.path.lexists(target):
                raise exists_already(target) from None
        else:
            temporary.unlink()
            return
    os.replace(temporary, target)


def _discard(temporary: Path, handle: BinaryIO) -> None:
    # `close` flushes, which fails again on a full disk. The caller reports the first error.
    with contextlib.suppress(OSError, ValueError):
        handle.close()
    with contextlib.suppress(OSError):
        temporary.unlink()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: the entries were written
        folder.rmdir()


def _exchange(path: Path, new: Path, old: Path, names: Sequence[str]) -> None:
    for file in (file for file in new.rglob("*") if file.is_file()):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    with contextlib.ExitStack() as undo:  # undo runs only after an error
        for name in (name for name in names if os.path.lexists(path / name)):
            os.rename(path / name, old / name)
            undo.callback(os.rename, old / name, path / name)
        for name in (name for name in reversed(names) if (new / name).exists()):
            os.rename(new / name, path / name)
            undo.callback(os.rename, path / name, new / name)
        undo.pop_all()


def _sync_folder(folder: Path) -> None:
    # A rename is durable only after fsync of the folder. Windows cannot open folders; some mounts cannot sync them.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError that caused an error, if it is one that a library raised: `torch.save` hides a full disk."""
    while isinstance(error, Exception) and not isinstance(error, PFStorerError):
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _write_error(path: str | os.PathLike[str], error: OSError) -> PFStorerError:
    if error.errno is None and re.search(r"\d+ requested and \d+ written", str(error)):  # NumPy names no cause
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    reason = (error.strerror or str(error)).lower()
    advice = _ADVICE.get(error.errno or 0, "check the path and the disk")
    return PFStorerError(f"{show_path(path)}: cannot be written ({reason}); {advice}")


def write_to_stdout(data: bytes) -> None:
    """Write bytes to standard output; raises PFStorerError if it cannot be written, BrokenPipeError if nobody reads."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _write_error("standard output", error) from error


def make_folder(path: Path, private: bool = False) -> Path:
    """Make a folder and its parents; returns the folder. Raises PFStorerError if it cannot be made.

    private: make new folders accessible to the owner only, independent of the umask; an existing folder keeps its mode.
    Folders in the data and cache directories are always private: other users with write access could replace an
    identity or the signing key.
    """
    private = private or any(path.is_relative_to(root) for root in (home(), cache_home()))
    mode = 0o700 if private else 0o777
    try:
        for folder in reversed((path, *path.parents)):  # `mkdir(parents=True)` sets the mode of the last folder only
            if folder == path or not folder.exists():
                folder.mkdir(mode, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PFStorerError(f"{show_path(path)}: this folder cannot be made ({reason}); choose another one") from error
    return path
