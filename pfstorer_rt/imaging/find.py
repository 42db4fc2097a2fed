"""Find the image files of folders. Every command and library function lists images with this module."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.files import show_path
from pfstorer_rt.imaging.formats import begins_as_image, describe_unread, image_suffixes, is_unread_image, some_names
from pfstorer_rt.imaging.metadata import is_marked

RESULT_SUFFIX = "_restored"
"""End of the stem of a result's name, unless the caller chooses another one."""
BESIDE = ("compare", "preview")
"""Kinds of files that may be written beside a result; the stem of such a file ends with its kind."""
_SYSTEM_FOLDERS = frozenset(
    ("@eaDir", "@Recycle", "@Recently-Snapshot", "@tmp", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found")
) | {"System Volume Information", "__MACOSX"}
"""Folders of network storages and operating systems. They hold thumbnails and deleted files."""

Note = Callable[[str], None]


@dataclass
class Listing:
    """The image files of a folder, and what was passed over."""

    images: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    """Images of formats that are not read on this machine."""
    without_suffix: list[Path] = field(default_factory=list)
    """Files of any kind whose names have no suffix."""
    closed: list[Path] = field(default_factory=list)
    """Folders that cannot be listed."""
    links: list[Path] = field(default_factory=list)
    """Links to folders, which are not followed."""
    broken: list[Path] = field(default_factory=list)
    """Links of images to missing files."""

    def report(self, note: Note) -> None:
        """Report what was passed over, in a line for each reason."""
        if self.unread:
            note(describe_unread(self.unread))
        if unnamed := [path for path in self.without_suffix if begins_as_image(path)]:
            note(
                f"{len(unnamed)} image(s) without a file extension were passed over: {some_names(unnamed)}; add one, "
                "such as .jpg"
            )
        for folder in self.closed:
            note(f"{show_path(folder)}: this folder cannot be read and was passed over; check its permissions")
        if self.links:
            note(
                f"{len(self.links)} link(s) to folders were passed over: {some_names(self.links)}; name these folders "
                "to read them"
            )
        if self.broken:
            note(f"{len(self.broken)} link(s) to missing files were passed over: {some_names(self.broken)}")


def survey(folder: Path, recursive: bool = True) -> Listing:
    """List the image files of a folder, sorted by path, and the images of formats that are not read.

    Hidden files and folders are left out (macOS writes `._IMG.jpg` beside `IMG.jpg`), and so are folders of network
    storages and operating systems. recursive: include sub-folders.
    """
    found, suffixes = Listing(), image_suffixes()

    def closed(error: OSError) -> None:
        found.closed.append(Path(error.filename or folder))

    for place, folders, names in os.walk(folder, onerror=closed):
        folders[:] = [n for n in folders if recursive and not n.startswith(".") and n not in _SYSTEM_FOLDERS]
        paths = [Path(place, n) for n in names if not n.startswith(".")]
        files, images = {p for p in paths if p.is_file()}, [p for p in paths if p.suffix.lower() in suffixes]
        found.images += [path for path in images if path in files]
        found.unread += [path for path in files if is_unread_image(path)]
        found.without_suffix += [path for path in files if not path.suffix]
        found.broken += [path for path in images if path not in files and path.is_symlink()]
        found.links += [path for path in (Path(place, n) for n in folders) if path.is_symlink()]
    for paths in (found.images, found.unread, found.without_suffix, found.links, found.broken):
        paths.sort()
    return found


def list_images(folder: Path, recursive: bool = True, note: Note | None = None) -> list[Path]:
    """List the image files of a folder as `survey` does; an empty list if there are none.

    note: receives a line for each reason why files were passed over.
    """
    found = survey(folder, recursive)
    if note:
        found.report(note)
    return found.images


def find_images(sources: str | Path | Sequence[str | Path], note: Note | None = None) -> list[Path]:
    """List the image files among `sources` (files, folders searched recursively, glob patterns), sorted by path.

    A source file may have any suffix. note: as in `list_images`.
    Raises `BadFileError` if a source is missing or no image is found, `SettingError` for an empty name.
    """
    found: set[Path] = set()
    paths = [Path(name) for name in names_of(sources)]
    for source in paths:
        if source.is_dir():
            found.update(list_images(source, note=note))
        elif source.exists():
            found.add(source)
        elif glob.has_magic(str(source)):
            found.update(matching(str(source), note))
        else:
            raise BadFileError(f"{show_path(source)}: no such file or folder")
    if not found:
        shown = ", ".join(map(show_path, paths))
        raise BadFileError(f"no images in {shown}; expected files such as .jpg, .png or .tif")
    return sorted(found)


def matching(pattern: str, note: Note | None = None) -> list[Path]:
    """Return the images that match a glob pattern, sorted; a pattern such as scans/* matches other files too.

    note: receives a line about images of formats that are not read.
    """
    suffixes = image_suffixes()
    paths = [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if not path.is_dir()]
    if note and (unread := [path for path in paths if is_unread_image(path)]):
        note(describe_unread(unread))
    return [path for path in paths if path.suffix.lower() in suffixes]


def names_of(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one or several files, folders or patterns as text.

    Raises `SettingError` for an empty name: pathlib uses the working directory for it.
    """
    names = [str(name) for name in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    if "" in names:
        raise SettingError("an empty name among the inputs; expected a file or a folder")
    return names


def is_result_name(stem: str, suffix: str = RESULT_SUFFIX) -> bool:
    """Whether the stem of a file has the suffix of a result, or of a file that is written beside a result."""
    return bool(suffix) and stem.endswith((suffix, *(f"{suffix}_{word}" for word in BESIDE)))


def is_result(path: Path, suffix: str = RESULT_SUFFIX) -> bool:
    """Whether a file is a result of this program, by its name or by the mark in its metadata."""
    if is_result_name(path.stem, suffix):
        return True
    try:
        status = path.stat()
    except OSError:
        return False
    return _is_marked(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _is_marked(path: Path, size: int, changed: int) -> bool:
    """Read the mark of a file once; a watched folder is listed every second. size, changed: the state of the file."""
    return is_marked(path)


def without_results(paths: Sequence[Path], note: Note) -> list[Path]:
    """Return the paths that are no results of this program, with a note for those left out.

    Raises `BadFileError` if nothing is left.
    """
    results = [path for path in paths if is_result(path)]
    if results and len(results) == len(paths):
        raise BadFileError(f"{show_path(paths[0])}: a result of this program; expected the original photographs")
    note_left_out(results, note)
    return [path for path in paths if path not in results]


def note_left_out(results: Sequence[Path], note: Note) -> None:
    """Report results of this program that are not used as inputs; no line without any."""
    if len(results) == 1:
        note(f"{show_path(results[0])}: left out, because it is a result of this program")
    elif results:
        more = len(results) - 1
        note(f"{show_path(results[0])} and {more} more: left out, because they are results of this program")


def images_of(folder: Path) -> list[Path]:
    """List the image files of a folder and its sub-folders; raises `BadFileError` if it is missing or has no image."""
    if not folder.is_dir():
        raise BadFileError(f"{folder}: no such folder")
    return find_images([folder])


def by_name(folder: Path) -> dict[str, Path]:
    """Return {relative path without suffix: path} for the images of a folder.

    Raises `BadFileError` if the folder is missing or has no image, or if two images have the same key.
    """
    found: dict[str, Path] = {}
    for path in images_of(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise BadFileError(f"{folder}: {path.name} and {found[name].name} have one name; keep one of them")
        found[name] = path
    return found
