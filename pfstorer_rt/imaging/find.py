"""Find the image files of folders. Every command and library function lists images with this module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.imaging.files import IMAGE_SUFFIXES


def list_images(folder: Path, recursive: bool = True) -> list[Path]:
    """List the image files of a folder, sorted by path; an empty list if there are none.

    recursive: include sub-folders.
    """
    found = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def find_images(sources: Sequence[Path]) -> list[Path]:
    """List the image files among `sources` (files, or folders searched recursively), sorted by path.

    A source file may have any suffix. Raises `BadFileError` if a source is missing or no image is found.
    """
    found: set[Path] = set()
    for source in sources:
        if not source.exists():
            raise BadFileError(f"{source}: no such file or folder")
        found.update(list_images(source) if source.is_dir() else [source])
    if not found:
        raise BadFileError(f"no images in {', '.join(map(str, sources))}; expected {' '.join(IMAGE_SUFFIXES)}")
    return sorted(found)


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
