"""Write docs/results.md from the rows of `heldout.py`, `people.py` and `tables.py`.

    python benchmarks/tables_document.py benchmarks/results/tables.csv --document docs/results.md

The page starts with the part of `portrait_tables.py`, which covers the rows of `heldout.py` and `people.py`.

In the rows of `tables.py`, methods can be measured on different sets of people. All rows of a table cover the same
people: there is one table for each set of people, with all methods that were measured on at least these people.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import click
from common import LARGEST_PSNR, by, line, number, read, values
from portrait_tables import portrait_part

Row = dict[str, Any]
COLUMNS = {
    "psnr": ("PSNR dB ↑", 2),
    "ssim": ("SSIM ↑", 3),
    "stlpips": ("ST-LPIPS ↓ †", 3),
    "lmse_dlib": ("LMSE px² ↓", 1),
    "id_dlib": ("ID (dlib) ↓ †", 3),
    "id_original_dlib": ("ID to original ↓ †", 3),
}
"""Key in the CSV -> title and digits. A dagger marks a training loss."""
FEW = 3
"""Smallest number of people for a table of differences, because a standard error needs several people."""
TITLES = {
    "heavy": "Heavy degradation",
    "light": "Light degradation",
    "clean": "Undegraded images as input",
}
HEADER = """
## `tiny` at 192 pixels

`tiny` was shipped before `portrait`. These rows are in [`{source}`](../{source}).

### Setup of the tables of `tiny`

- **People**: {people}. No training and no choice of settings used photographs of them. Each person has five reference
  photographs. {count} other photographs of each person are degraded and restored.
- **Images**: centre crops of {tile} x {tile} pixels. The number of the photograph is the seed.
- **Base**: `tiny` (fingerprint `{base}`); one step unless the row states another number.
- **Personalization**: {iterations} iterations unless the row states another number.
- **Hardware**: {machine}. The rows were measured on several machines of this type: small differences between the
  times have no meaning.
- **Command**: `python benchmarks/tables.py PEOPLE`, where `PEOPLE` has one folder of photographs for each person.

### Columns of the tables of `tiny`

| column | definition |
| --- | --- |
| ST-LPIPS | shift-tolerant LPIPS with the weights of the package `stlpips_pytorch` |
| LMSE | mean squared distance between dlib's 68 landmarks in the result and in the original |
| ID (dlib) | mean Euclidean distance of dlib's embeddings of result and references, over the images with a face |
| ID to original | the same distance to the original |
| verified | share of images with ID (dlib) below 0.6; an image without a detected face is not verified |
| faces found | number of images in which dlib detects a face |
| s/image | median time of one restoration in PyTorch |

† **Training losses.** The last training stage of the base used three losses on decoded images: L1, ST-LPIPS and the
distance of dlib's embeddings. The personalization method `PFStorer` uses them again. `PFStorer, latents alone`,
`Base + ViCo`, `Base + DreamBooth` and `500 iterations` are personalized without them. Therefore ST-LPIPS and ID are
optimistic for `PFStorer`, and L1 favours its PSNR. LMSE and SSIM were not training losses.

ID (dlib) of the input covers only the images in which a face is detected. These are the less degraded ones. Use
"verified" to compare with the input.

"±" is the standard error over the people. [Evaluation](evaluation.md) describes the metrics, and
[Training](training.md) describes the losses.
"""


def write_document(path: Path, rows: list[Row], source: Path) -> None:
    """Write the part of `portrait`, then for `tiny` one section per level, with one table for each set of people."""
    rows = [{**r, "psnr": "inf" if r["psnr"] == str(LARGEST_PSNR) else r["psnr"]} for r in rows]
    first = rows[0]
    people = {r["person"] for r in rows}
    photographs = {(r["person"], r["picture"]) for r in rows}
    text = portrait_part() + HEADER.format(
        source=source.as_posix(),
        people=len(people),
        count=round(len(photographs) / len(people)),
        tile=192,
        base=first["base"],
        iterations=max(int(r["iterations"] or 0) for r in rows),
        machine=f"{first['processor']}, {first['threads']} thread, torch {first['torch']}",
    )
    for level, title in TITLES.items():
        chosen = [r for r in rows if r["level"] == level]
        if chosen:
            text += f"\n### {title}\n"
            text += "".join(section(group) for group in same_people(chosen))
    path.write_text(text)


def same_people(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows for each set of people, largest set first, of all methods that have at least these people."""
    people = {method: frozenset(by(mine, "person")) for method, mine in by(rows, "method").items()}
    for chosen in sorted(set(people.values()), key=lambda found: (-len(found), sorted(found))):
        yield [r for r in rows if r["person"] in chosen and chosen <= people[r["method"]]]


def section(rows: Sequence[Row]) -> str:
    """Return the section of one set of people: a table of means, and with enough people the differences to the base."""
    people = by(rows, "person")
    text = f"\n#### {len(people)} people\n\n{table(rows)}"
    return text + f"\nDifference to the base, paired by person:\n\n{differences(rows)}" if len(people) >= FEW else text


def table(rows: Sequence[Row]) -> str:
    """Return a table of the means of every method."""
    heads = ["", *(title for title, _ in COLUMNS.values()), "verified †", "faces found", "s/image"]
    lines = [line(heads), line(["---"] * len(heads))]
    for method, mine in by(rows, "method").items():
        figures = [number(values(mine, key), digits) for key, (_, digits) in COLUMNS.items()]
        accepted, found = values(mine, "verification_dlib"), values(mine, "id_dlib")
        share = [f"{fmean(accepted):.0%}", f"{len(found)} of {len(mine)}", f"{median(values(mine, 'seconds')):.2f}"]
        lines.append(line([method, *figures, *share]))
    return "\n".join(lines) + "\n"


def differences(rows: Sequence[Row]) -> str:
    """Return a table of each method's mean difference to the base, with its standard error over the people."""
    methods = by(rows, "method")
    base = by(methods.pop("Base"), "person")
    heads = ["", "PSNR dB", "LMSE px²", "ID (dlib) †", "verified, points †"]
    lines = [line(heads), line(["---"] * len(heads))]
    for method, mine in methods.items():
        pairs = [(theirs, base[person]) for person, theirs in by(mine, "person").items()]
        cells = []
        for key, digits, scale in (
            ("psnr", 2, 1),
            ("lmse_dlib", 1, 1),
            ("id_dlib", 3, 1),
            ("verification_dlib", 0, 100),
        ):
            found = [d for a, b in pairs if (d := shared_difference(a, b, key)) is not None]
            cells.append(spread([scale * d for d in found], digits))
        lines.append(line([method, *cells]))
    return "\n".join(lines) + "\n"


def shared_difference(a: Sequence[Row], b: Sequence[Row], key: str) -> float | None:
    """Return the mean difference over the images with a value in both."""
    others = {r["picture"]: r[key] for r in b if r[key] != ""}
    found = [float(r[key]) - float(others[r["picture"]]) for r in a if r[key] != "" and r["picture"] in others]
    return fmean(found) if found else None


def spread(found: Sequence[float], digits: int) -> str:
    """Return mean and standard error as text."""
    if not found:
        return "-"
    if any(map(math.isinf, found)):
        return "∞"
    error = f" ± {stdev(found) / len(found) ** 0.5:.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):+.{digits}f}{error}"


@click.command()
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--document", type=click.Path(path_type=Path), help="Page to write.")
def main(rows: Path, document: Path | None) -> None:
    if document:
        write_document(document, read(rows), rows)


if __name__ == "__main__":
    main()
