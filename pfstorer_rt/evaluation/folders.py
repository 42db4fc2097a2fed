"""Evaluate folders: pair originals with results of any method by file name, and measure each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError
from pfstorer_rt.evaluation.page import THUMBNAILS, thumbnail
from pfstorer_rt.evaluation.registry import Metrics, Sample, load_metrics
from pfstorer_rt.evaluation.report import INPUT, ORIGINAL, Report, Row
from pfstorer_rt.imaging.files import load_image
from pfstorer_rt.imaging.find import by_name, images_of
from pfstorer_rt.imaging.formats import some_names

ENDINGS = ("", "_restored", "_degraded_restored", "_degraded", "_out")
"""Suffixes that the name of a result may add to the name of its original."""
Seconds = Mapping[str, float]


def evaluate(
    refs: str | Path,
    hq: str | Path,
    outputs: str | Path | Mapping[str, str | Path],
    inputs: str | Path | None = None,
    *,
    seconds: Mapping[str, float | Seconds] | None = None,
    metrics: Metrics | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure restored images of any method against their originals and references of the person.

    refs: folder of photographs of the person, or of a sub-folder for each person; `hq` then has the same sub-folders.
    hq: folder of originals. outputs: folder of results, or name of a method -> folder; may be an empty mapping.
    inputs: folder of the degraded images, measured as the method "input". Folders are searched recursively; the
    result of `a.jpg` is `a.*` or `a_restored.*` in the corresponding folder, of the same size.
    seconds: method -> seconds per image, or name of an image (or its path without suffix) -> seconds.
    metrics: metrics to measure; None loads all. progress: called with (done, total) images.
    An image without a result, or with a result that cannot be measured, becomes a row with the reason and counts as
    not verified; other images are not affected. Raises `BadFileError` when a folder is missing or empty, when a person
    has no references, or when no result of a method can be measured, and `ValueError` for a method named "input" or
    "original".
    """
    refs, hq = Path(refs), Path(hq)
    named = outputs if isinstance(outputs, Mapping) else {Path(outputs).name or "output": outputs}
    methods = {name: Path(folder) for name, folder in named.items()}
    reserved = sorted({INPUT, ORIGINAL} & set(methods))
    if reserved:
        raise SettingError(f"the method name {reserved[0]!r} is reserved for a reference row; choose another name")
    metrics = metrics or load_metrics()
    originals = by_name(hq)
    folders = {**({INPUT: Path(inputs)} if inputs else {}), **methods}
    results = {method: match(originals, folder) for method, folder in folders.items()}
    people = People(refs)
    references = {name: people.of(name) for name in originals}
    shown = set(evenly(list(originals), THUMBNAILS))
    rows: list[Row] = []
    for done, (name, path) in enumerate(originals.items()):
        found = {method: results[method][name] for method in results}
        times = {method: image_seconds(known, name) for method, known in (seconds or {}).items()}
        rows += measure_image(name, path, found, references[name], metrics, times, name in shown)
        if progress:
            progress(done + 1, len(originals))
    refuse_empty(rows, folders)
    named = {"references": str(refs), "originals": str(hq), **{f"folder of {m}": str(f) for m, f in folders.items()}}
    unused = (note for method, folder in folders.items() for note in unused_notes(method, folder, results[method]))
    return Report(rows, metrics, [*people.notes(metrics), *unused, *row_notes(rows)], named)


def measure_image(
    name: str,
    path: Path,
    found: Mapping[str, Path | None],
    references: Sequence[Sample],
    metrics: Metrics,
    times: Mapping[str, float | None],
    shown: bool,
) -> list[Row]:
    """Measure the results of all methods for one original, and the original; a damaged original gives failed rows."""
    try:
        original = Sample(load_image(path).pixels)
    except PFStorerError as error:
        nothing: dict[str, float | None] = {column.key: None for column in metrics.columns}
        return [Row(method, name, nothing, None, f"original: {error}", failed=True) for method in (*found, ORIGINAL)]
    samples: dict[str, Path | Sample | None] = {**found, ORIGINAL: original}
    return [
        measure_one(method, name, result, original, references, metrics, times.get(method), shown)
        for method, result in samples.items()
    ]


def measure_one(
    method: str,
    name: str,
    result: Path | Sample | None,
    original: Sample,
    references: Sequence[Sample],
    metrics: Metrics,
    seconds: float | None,
    shown: bool,
) -> Row:
    """Measure one result; a result that cannot be measured becomes a row with the reason."""
    try:
        if result is None:
            raise PFStorerError("no result")
        sample = result if isinstance(result, Sample) else Sample(load_image(result).pixels)
        figures = metrics.measure(sample, original, references)
    except (PFStorerError, ValueError) as error:
        return Row(method, name, metrics.of_failure(original, references), None, str(error), failed=True)
    small = thumbnail(sample.pixels) if shown else b""
    absent = figures.get("verification_dlib") is not None and figures.get("id_dlib", 0.0) is None
    return Row(method, name, figures, seconds, "no face found" if absent else "", small)


def refuse_empty(rows: Sequence[Row], folders: Mapping[str, Path]) -> None:
    """Raise `BadFileError` with the first reason when no result of a method could be measured."""
    for method, folder in folders.items():
        own = [row for row in rows if row.method == method]
        if all(row.failed for row in own):
            raise BadFileError(f"{folder}: no result could be measured; {own[0].image}: {own[0].note}")


def row_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Return a line for each row with a note."""
    return (f"{row.method}: {row.image}: {row.note}" for row in rows if row.note)


def unused_notes(method: str, folder: Path, matched: Mapping[str, Path | None]) -> list[str]:
    """Return a line about the images of a method's folder that are the result of no original."""
    left = [path for path in images_of(folder) if path not in matched.values()]
    text = f"{method}: {len(left)} image(s) without an original of this name were left out: {some_names(left)}"
    return [text] if left else []


def image_seconds(seconds: float | Seconds | None, name: str) -> float | None:
    """Return the time of one image, matched by name like its result; names may include folders."""
    if not isinstance(seconds, Mapping):
        return seconds
    wanted = [name + ending for ending in ENDINGS]
    found = {key: second for key, second in seconds.items() if any(f"/{key}".endswith(f"/{one}") for one in wanted)}
    return found[min(found, key=len)] if found else None


@dataclass
class People:
    """Photographs of one person, or of several in sub-folders."""

    refs: Path

    def __post_init__(self) -> None:
        files = images_of(self.refs)
        self._groups: dict[str, list[Sample]] = {}
        for path in files:
            relative = path.relative_to(self.refs)
            person = relative.parts[0] if len(relative.parts) > 1 else ""
            self._groups.setdefault(person, []).append(Sample(load_image(path).pixels))

    def of(self, name: str) -> list[Sample]:
        """Return the references of the person in an image; raises `BadFileError` when there are none."""
        person = name.split("/")[0] if "/" in name else ""
        for key in (person, ""):
            if key in self._groups:
                return self._groups[key]
        if len(self._groups) == 1:
            return next(iter(self._groups.values()))
        raise BadFileError(f"{self.refs}: no references of {name}; expected a folder {person or 'for each person'}")

    def notes(self, metrics: Metrics) -> list[str]:
        """Return a line for each person whose references show no face."""
        from pfstorer_rt.evaluation.loaders import known_faces
        from pfstorer_rt.faces.finding import face_embedder

        embed = face_embedder()
        if embed is None or "id_dlib" not in metrics.measures:
            return []
        empty = [person or str(self.refs) for person, refs in self._groups.items() if not known_faces(refs, embed)]
        return [f"{person}: identity was not measured: no face was found in the references" for person in empty]


def match(originals: Mapping[str, Path], folder: Path) -> dict[str, Path | None]:
    """Return original -> result in a folder, or None; raises `BadFileError` for an original with two results."""
    found, matched = by_name(folder), dict[str, "Path | None"]()
    for name in originals:
        endings = [ending for ending in ENDINGS if not ending or name + ending not in originals]
        named = [found[name + ending] for ending in endings if name + ending in found]
        if len(named) > 1:
            both = " and ".join(path.name for path in named[:2])
            raise BadFileError(f"{folder}: {both} are both named as results of {name}; keep one of them")
        matched[name] = named[0] if named else None
    return matched


def evenly(names: Sequence[str], count: int) -> list[str]:
    """Return at most `count` names, evenly spaced."""
    step = max(1, -(-len(names) // count))
    return list(names[::step])
