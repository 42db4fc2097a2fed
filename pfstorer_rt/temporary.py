"""Owner-only temporary files and folders. If a process is killed, the next run removes its files.

A process locks its temporary files and folders. `sweep` removes all entries without a lock.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX, SUFFIX = ".pfstorer-", ".tmp"
KEPT = "old"
"""Entry of a temporary folder for a user's files while they are replaced. A folder with this entry is not removed."""
_UNLOCKED_AGE = 7 * 24 * 3600.0  # seconds; age at which unlocked files are removed on file systems without locks
_ATTEMPTS = 8


def temporary_file(folder: Path, mode: int | None = None) -> tuple[Path, int]:
    """Create and lock an empty file in a folder; returns (path, writable descriptor).

    mode: permission bits; None uses the umask. Closing the descriptor releases the lock.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)

    def make(path: Path) -> int:
        descriptor = os.open(path, flags, 0o666 if mode is None else mode)
        try:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)  # the umask may have removed bits from the mode of os.open
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        return descriptor

    return _made_and_locked(folder, make)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder with mode 0o700 in `parent`; the end of the block removes it with its content."""

    def make(path: Path) -> int:
        path.mkdir(mode=0o700)
        return os.open(path, os.O_RDONLY) if fcntl else -1

    sweep_once(parent.absolute())
    path, descriptor = _made_and_locked(parent, make)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files and folders of killed processes from a folder; returns their paths.

    Entries of running processes and folders with a user's files (`KEPT`) are not removed.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be listed has nothing to remove
        candidates = [Path(e) for e in os.scandir(folder) if e.name.startswith(PREFIX) and e.name.endswith(SUFFIX)]
        return [path for path in candidates if _remove_abandoned(path)]
    return []


@functools.cache
def sweep_once(folder: Path) -> None:
    """Sweep a folder once per process, because listing a large folder is slow."""
    sweep(folder)


def _made_and_locked(folder: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    for _ in range(_ATTEMPTS):
        path = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"  # short: a name has a maximum length
        try:
            descriptor = make(path)
        except FileNotFoundError:
            if not folder.is_dir():
                raise
            continue  # another process removed it before it was locked
        if _lock(descriptor) is not False and os.path.lexists(path):
            return path, descriptor
        os.close(descriptor)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(folder))


def _lock(descriptor: int) -> bool | None:
    """Try to lock an open file or folder: False if another process holds the lock, None if locks are not supported."""
    if fcntl is None or descriptor < 0:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support locks
        return None
    return True


def _remove_abandoned(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_symlink():
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if fcntl else -1
        try:
            locked = _lock(descriptor)
            old = time.time() - path.lstat().st_mtime > _UNLOCKED_AGE
            # Check after locking: without the lock, a running process could still move files there.
            kept = any((path / KEPT).glob("*"))
            return (locked or (locked is None and old)) and not kept and _remove(path)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return False


def _remove(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return True
