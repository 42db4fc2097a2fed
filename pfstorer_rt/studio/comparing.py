"""Actions of the tab that compares: folders of results side by side, and user studies."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pfstorer_rt.errors import SettingError
from pfstorer_rt.evaluation.folders import match
from pfstorer_rt.imaging.find import by_name
from pfstorer_rt.studio.comparison import Comparison
from pfstorer_rt.studio.restoring import shown
from pfstorer_rt.studio.workspace import Session, Workspace
from pfstorer_rt.study import Study, create_study

SLOTS = 4
"""Number of folders that the page compares."""


def take_folders(workspace: Workspace, session: Session, folders: Sequence[tuple[str, Sequence[str]]]) -> Comparison:
    """Copy the dropped folders (method, files) into the session, and pair their pictures by name.

    The names of the first folder may have additions in the others, such as `_restored`. Raises `SettingError` for
    fewer than two folders, for a name that occurs twice, and for folders without a common picture.
    """
    given = [(name.strip() or f"Folder {number + 1}", files) for number, (name, files) in enumerate(folders) if files]
    names = [name for name, _ in given]
    if len(given) < 2:
        raise SettingError(
            f"{len(given)} folders with pictures, expected two or more; drop each folder into its own box"
        )
    if len(set(names)) < len(names):
        raise SettingError("two folders have the same name; expected a different name for each")
    places = []
    for number, (_, files) in enumerate(given):
        place = session.folder / f"compare_{number}"
        for path in workspace.take(files, place):
            workspace.check_pixels(path)
        places.append(place)
    first = by_name(places[0])
    results: dict[str, Mapping[str, Path]] = {names[0]: first}
    for name, place in zip(names[1:], places[1:], strict=True):
        results[name] = {key: path for key, path in match(first, place).items() if path is not None}
    found = Comparison(results)
    if not found.names:
        raise SettingError("the folders have no picture of the same name; rename the files so that their names agree")
    return found


def side_by_side(workspace: Workspace, session: Session, found: Comparison, name: str) -> list[tuple[str, str]]:
    """Return (address, method) of a picture of every method."""
    if name not in found.names:
        raise SettingError(f"{name}: no picture of this name in all folders")
    return [(shown(workspace, session, own[name]), method) for method, own in found.results.items()]


def chosen(code: str | None) -> str:
    """Return the code of the chosen study; raises `SettingError` when none is chosen."""
    if not code:
        raise SettingError("no study is chosen: make a study first")
    return code


def votes_file(workspace: Workspace, session: Session, study: Study) -> str:
    """Return the address of a copy of the votes of a study; empty before the first vote."""
    votes = study.folder / "votes.csv"
    if not votes.is_file():
        return ""
    target = session.folder / f"votes_{study.code}.csv"
    shutil.copyfile(votes, target)
    return workspace.publish(target)


def start_study(workspace: Workspace, session: Session, found: Comparison | None, references: Sequence[str]) -> Study:
    """Make a study of the compared folders. references: photographs of the person. Raises `SettingError`."""
    if found is None:
        raise SettingError("nothing is compared yet: drop two folders first")
    taken = workspace.take(references, session.folder / "study_references") if references else []
    for path in taken:
        workspace.check_pixels(path)
    return create_study(found.results, taken)
