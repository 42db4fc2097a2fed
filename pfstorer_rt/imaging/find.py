"""Find the image files of folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.imaging.files import IMAGE_SUFFIXES


def find_images(sources: Sequence[Path]) -> list[Path]:
    """List the image files among `sources` (files, or folders searched recursively), sorted by path.

    Raises `BadFileError` when a source is missing or nothing is found.
    """
    found: set[Path] = set()
    for source in sources:
        if source.is_dir():
            found.update(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif source.exists():
            found.add(source)
        else:
            raise BadFileError(f"{source}: no such file or folder")
    if not found:
        raise BadFileError(f"no photographs in {', '.join(map(str, sources))}; expected {' '.join(IMAGE_SUFFIXES)}")
    return sorted(found)


def by_name(folder: Path) -> dict[str, Path]:
    """Pictures by their path in the folder without suffix; raises BadFileError when two have one name."""
    found: dict[str, Path] = {}
    for path in pictures(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise BadFileError(f"{folder}: {path.name} and {found[name].name} have one name; keep one of them")
        found[name] = path
    return found


def pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder and its sub-folders, sorted; raises `BadFileError` when there are none."""
    if not folder.is_dir():
        raise BadFileError(f"{folder}: no such folder")
    found = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not found:
        raise BadFileError(f"{folder}: no pictures; expected {' '.join(IMAGE_SUFFIXES)}")
    return found
