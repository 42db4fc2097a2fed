"""The private folder of a running studio, the files that its page may fetch, and the state of every open page."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfstorer_rt.errors import SettingError
from pfstorer_rt.faces.references import References
from pfstorer_rt.files import real_path, system_folder
from pfstorer_rt.imaging.files import image_size
from pfstorer_rt.runtime.batch import Outcome
from pfstorer_rt.studio.comparison import Comparison
from pfstorer_rt.studio.config import Limits
from pfstorer_rt.studio.work import Work
from pfstorer_rt.temporary import temporary_folder


@dataclass
class Session:
    """The state of one open page."""

    folder: Path
    inputs: list[Path] = field(default_factory=list)
    """Copies of the dropped pictures."""
    outcomes: dict[Path, Outcome] = field(default_factory=dict)
    """Input -> its outcome."""
    choices: dict[Path, str] = field(default_factory=dict)
    """Input -> the choice of the engine that restored it."""
    references: References | None = None
    """Photographs of the person that were dropped for the likeness."""
    comparison: Comparison | None = None
    """Folders that are compared."""
    work: Work[Any] | None = None

    def cancel(self) -> None:
        """Cancel the running call."""
        if self.work is not None:
            self.work.cancel()


class Workspace:
    """A private folder, published files by an unguessable name, and sessions."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.uploads = folder / "uploads"
        self.uploads.mkdir(mode=0o700)
        self._published: dict[str, Path] = {}
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def session(self, key: str | None) -> Session:
        """Return the state of a page; made when it is asked for first."""
        with self._lock:
            if key not in self._sessions:
                folder = Path(tempfile.mkdtemp(dir=self.folder))
                self._sessions[str(key)] = Session(folder)
            return self._sessions[str(key)]

    def is_busy(self) -> bool:
        """Whether a call of any page is running."""
        with self._lock:
            return any(session.work is not None and session.work.running for session in self._sessions.values())

    def close(self, key: str | None) -> None:
        """Cancel the work of a page, and delete its files."""
        with self._lock:
            session = self._sessions.pop(str(key), None)
            if session is None:
                return
            gone = [name for name, path in self._published.items() if path.is_relative_to(session.folder)]
            for name in gone:
                del self._published[name]
        session.cancel()
        shutil.rmtree(session.folder, ignore_errors=True)

    def publish(self, path: Path) -> str:
        """Return a new address of a file of this workspace, relative to the page."""
        name = f"{secrets.token_urlsafe(18)}/{path.name}"
        self._published[name] = path
        return f"pictures/{name}"

    def published(self, name: str) -> Path | None:
        """Return the file of an address; None for an unknown address."""
        return self._published.get(name)

    def used_bytes(self) -> int:
        """Return the size of all files of the workspace."""
        found = 0
        for place, _, names in os.walk(self.folder):
            for name in names:
                try:
                    found += os.lstat(os.path.join(place, name)).st_size
                except OSError:  # deleted meanwhile
                    continue
        return found

    def take(self, files: Sequence[str], folder: Path, most: int | None = None) -> list[Path]:
        """Copy dropped files into a new folder, with a number where a name occurs twice; returns the copies.

        Raises `SettingError` for too many files, a file outside the uploads, a large file and a large picture.
        """
        most = most or self.limits.files
        if len(files) > most:
            raise SettingError(f"{len(files)} pictures: expected at most {most}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        return [self._take(Path(file), folder) for file in files]

    def _take(self, file: Path, folder: Path) -> Path:
        if not real_path(file).is_relative_to(real_path(self.folder)):
            raise SettingError(f"{file.name}: not a file that was dropped on this page")
        if file.stat().st_size > self.limits.file_bytes:
            size, most = file.stat().st_size >> 20, self.limits.file_bytes >> 20
            raise SettingError(f"{file.name}: {size} MB, expected at most {most} MB")
        target, number = folder / file.name, 1
        while target.exists():
            number += 1
            target = folder / f"{file.stem}_{number}{file.suffix}"
        shutil.copyfile(file, target)
        return target

    def without_folders(self, text: str) -> str:
        """Return a text in which each file of this workspace has its own name only."""
        return re.sub(re.escape(str(self.folder)) + r"[/\\](?:[^/\\\s]+[/\\])*", "", text)

    def check_pixels(self, path: Path) -> tuple[int, int]:
        """Return the size of a picture; raises `PFStorerError` for one that is too large or no picture."""
        return image_size(path, self.limits.pixels)


@contextmanager
def open_workspace(limits: Limits) -> Iterator[Workspace]:
    """Make a workspace in a private temporary folder; the end of the block deletes it."""
    with temporary_folder(system_folder()) as folder:
        yield Workspace(folder, limits)
