"""All results of a batch in one zip, with a JSON report."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pfstorer_rt.errors import SettingError
from pfstorer_rt.files import atomic_write
from pfstorer_rt.runtime.batch import Outcome

REPORT = "report.json"


def package_results(path: Path, outcomes: Sequence[Outcome]) -> Path:
    """Write the results and `report.json` to a zip, readable by its owner only; returns the path.

    The report has an entry for every outcome, with the names of the files and without their folders. A second result
    with the name of another one gets a number. Raises `SettingError` when no image was restored.
    """
    done = [outcome for outcome in outcomes if outcome.status == "done" and outcome.job.target is not None]
    if not done:
        raise SettingError("no image was restored; restore one first")
    names = _unique_names(done)
    with atomic_write(path, mode=0o600) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for outcome in done:
            assert outcome.job.target is not None
            archive.write(outcome.job.target, names[outcome.job.target])
        archive.writestr(REPORT, json.dumps([_entry(outcome, names) for outcome in outcomes], indent=2))
    return path


def _unique_names(outcomes: Sequence[Outcome]) -> dict[Path, str]:
    """Return the name of every result in the zip."""
    names: dict[Path, str] = {}
    for outcome in outcomes:
        target, number = outcome.job.target, 1
        assert target is not None
        name = target.name
        while name in names.values() or name == REPORT:
            number += 1
            name = f"{target.stem}_{number}{target.suffix}"
        names[target] = name
    return names


def _entry(outcome: Outcome, names: dict[Path, str]) -> dict[str, Any]:
    """Return the report of an outcome without folders."""
    entry: dict[str, Any] = outcome.report()
    target = outcome.job.target
    entry["input"] = Path(entry["input"]).name
    entry["output"] = names.get(target, target.name) if target is not None else entry["output"]
    entry = {key: _without_folders(value, outcome) for key, value in entry.items()}
    return {key: value for key, value in entry.items() if key not in ("compare", "preview")}


def _without_folders(value: Any, outcome: Outcome) -> Any:
    """Return a text, or a list of texts, without the folders of the input and the result; other values unchanged."""
    if isinstance(value, list):
        return [_without_folders(each, outcome) for each in value]
    if isinstance(value, str):
        for file in (outcome.job.source, outcome.job.target):
            value = value.replace(str(file), file.name) if file is not None else value
    return value
