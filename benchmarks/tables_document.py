"""Writes docs/results.md from the rows of `tables.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

Row = dict[str, Any]
COLUMNS = [
    ("PSNR dB ↑", "psnr", 2),
    ("SSIM ↑", "ssim", 3),
    ("ST-LPIPS ↓", "stlpips", 3),
    ("LMSE px² ↓", "lmse_dlib", 1),
    ("ID (dlib) ↓", "id_dlib", 3),
    ("ID to original ↓", "id_original_dlib", 3),
]
TITLES = {
    "heavy": "Heavy degradation",
    "light": "Light degradation",
    "clean": "Clean pictures as input (the identity has to survive)",
}
HEADER = """# Results on people that no training has seen

Made by `python benchmarks/tables.py PEOPLE --document docs/results.md` from [`{source}`](../{source}); do not edit.

{people} people with five reference photographs each, {pictures} other photographs of each restored, at {tile} pixels,
base `{base}`, on {machine}. The degradations are this project's levels `heavy` and `light`
(`pfstorer-rt degrade`), with the picture's number as the seed; their result is enlarged bicubically, so "Input" is the
"bicubic" row too. Identity is measured with dlib (the paper uses ArcFace): the mean distance to the references over
the pictures in which a face is found, which among inputs are the better ones, and the share accepted as the same person
(distance under 0.6; a picture without a face is not accepted). ST-LPIPS is the shift-tolerant LPIPS whose weights its
package ships; LPIPS and MUSIQ need weights that could not be had here and are not in the table. Both were objectives of
the base's last training, on other people, and of learning a person with `PFStorer` (docs/training.md): they flatter
it beside the rows of latents alone, which are ViCo's, DreamBooth's and those that say so. LMSE, of dlib's landmarks,
and PSNR are the ones to compare by. `±` is the standard error over the people, s/picture a median
(rows were not all measured on the same processor). A person is learned in the base's own number of iterations, 1000 for
`tiny`; `500 iterations` is PFStorer with latents alone, or the method named, in half. Methods whose number of people
differs are compared in the second table of each level, person by person.
"""


def write_document(path: Path, rows: list[Row], source: Path) -> None:
    """Write one table for each level, and how far the methods are from the base."""
    first = rows[0]
    counts = {(r["person"], r["picture"]) for r in rows}
    people = {r["person"] for r in rows}
    text = HEADER.format(
        source=source.as_posix(),
        people=len(people),
        pictures=round(len(counts) / len(people)),
        tile=192,
        base=first["base"],
        machine=f"{first['processor']}, torch {first['torch']}",
    )
    for level, title in TITLES.items():
        chosen = [r for r in rows if r["level"] == level]
        if chosen:
            text += f"\n## {title}\n\n{table(chosen)}\n{differences(chosen)}"
    path.write_text(text)


def table(rows: Sequence[Row]) -> str:
    """Means of every method."""
    heads = ["", "people", *(title for title, _, _ in COLUMNS), "verified", "faces found", "s/picture"]
    lines = [line(heads), line(["---"] * len(heads))]
    for method, mine in by(rows, "method").items():
        figures = [number(values(mine, key), digits) for _, key, digits in COLUMNS]
        accepted, found = values(mine, "verification_dlib"), values(mine, "id_dlib")
        share = [f"{fmean(accepted):.0%}", f"{len(found)} of {len(mine)}", f"{median(values(mine, 'seconds')):.2f}"]
        lines.append(line([method, str(len(by(mine, "person"))), *figures, *share]))
    return "\n".join(lines) + "\n"


def differences(rows: Sequence[Row]) -> str:
    """What each method adds to the base, person by person, over the people that both were measured on."""
    methods = by(rows, "method")
    base = by(methods.pop("Base", []), "person")
    if not base:
        return ""
    heads = ["minus Base", "PSNR dB", "ID (dlib)", "verified, points"]
    lines = [line(heads), line(["---"] * 4)]
    for method, mine in methods.items():
        pairs = [(theirs, base[person]) for person, theirs in by(mine, "person").items() if person in base]
        cells = [spread([mean(a, "psnr") - mean(b, "psnr") for a, b in pairs], 2)]
        cells.append(spread([d for a, b in pairs if (d := shared_difference(a, b, "id_dlib")) is not None], 3))
        cells.append(spread([100 * (mean(a, "verification_dlib") - mean(b, "verification_dlib")) for a, b in pairs], 0))
        lines.append(line([method, *cells]))
    return "\n".join(lines) + "\n"


def shared_difference(a: Sequence[Row], b: Sequence[Row], key: str) -> float | None:
    """Mean difference over the pictures for which both have a figure."""
    others = {r["picture"]: r[key] for r in b if r[key] != ""}
    found = [float(r[key]) - float(others[r["picture"]]) for r in a if r[key] != "" and r["picture"] in others]
    return fmean(found) if found else None


def by(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Group rows, in the order of their first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def values(rows: Sequence[Row], key: str) -> list[float]:
    """The figures that there are."""
    return [float(r[key]) for r in rows if r[key] != ""]


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean of the figures that there are."""
    return fmean(values(rows, key))


def number(found: Sequence[float], digits: int) -> str:
    """Mean as text."""
    return f"{fmean(found):.{digits}f}" if found else "-"


def spread(found: Sequence[float], digits: int) -> str:
    """Mean and standard error as text."""
    if not found:
        return "-"
    error = f" ± {stdev(found) / len(found) ** 0.5:.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):+.{digits}f}{error}"


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
