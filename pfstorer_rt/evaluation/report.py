"""Results of an evaluation: a row per method and image, means per method, and the files written from them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pfstorer_rt.evaluation.page import Chart, Gallery, Table, page
from pfstorer_rt.evaluation.registry import Metric, Metrics
from pfstorer_rt.files import atomic_write, make_folder

INPUT, ORIGINAL = "input", "original"
"""Methods of the reference rows: degraded inputs and originals, measured like results."""
SECONDS = "seconds"
TABLE = "results.csv"
"""File of the rows in the folder of a report."""
ABOUT = ["metric", "meaning", "version", "licence", "state"]


@dataclass(frozen=True)
class Row:
    """Values of one image by one method."""

    method: str
    image: str
    figures: Mapping[str, float | None]
    """Key of a metric -> value, as `Metrics.measure` returns them."""
    seconds: float | None = None
    """Time of the method for this image; None if unknown."""
    note: str = ""
    """Why values are missing."""
    thumbnail: bytes = field(default=b"", repr=False)
    """A small JPEG for the page; empty without one."""
    failed: bool = False
    """The result is missing or could not be measured."""


@dataclass(frozen=True)
class Summary:
    """Means of one method over its images."""

    images: int
    failed: int
    means: dict[str, float | None]
    """Key of a metric, or `seconds` -> mean over the images with a value; None without any."""
    counts: dict[str, int]
    """Key -> number of images with a value."""


@dataclass(frozen=True)
class Report:
    """All rows, their metrics, and notes on what could not be measured."""

    rows: list[Row]
    metrics: Metrics
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that the values depend on: level, seed, folders."""

    @property
    def methods(self) -> list[str]:
        """Return the names of the methods: input first, original last, others in the order of their first row."""
        names = dict.fromkeys(row.method for row in self.rows)
        middle = [name for name in names if name not in (INPUT, ORIGINAL)]
        return [*(n for n in (INPUT,) if n in names), *middle, *(n for n in (ORIGINAL,) if n in names)]

    @property
    def images(self) -> list[str]:
        """Return the names of the images in the order of their first row."""
        return list(dict.fromkeys(row.image for row in self.rows))

    def summary(self, common: bool = False) -> dict[str, Summary]:
        """Return the means of each method.

        common: use only `common_images`, so that all values of all methods cover the same images.
        """
        images = self.common_images() if common else set(self.images)
        return {method: self._summary(method, images) for method in self.methods}

    def common_images(self) -> set[str]:
        """Return the images for which every method has a value of every metric.

        dlib, for example, finds no face in some degraded images. A method without any value of a metric does not
        restrict the images, and neither do times, which few methods have.
        """
        images = set(self.images)
        for metric in self.metrics.columns:
            found: dict[str, set[str]] = {}
            for row in self.rows:
                if row.figures.get(metric.key) is not None:
                    found.setdefault(row.method, set()).add(row.image)
            images = images.intersection(*found.values())
        return images

    def write(self, folder: Path) -> None:
        """Write results.csv, summary.json, results.md and index.html into a folder; existing ones are replaced."""
        make_folder(folder)
        texts = {
            TABLE: self.csv(),
            "summary.json": self.json(),
            "results.md": self.markdown(),
            "index.html": self.html(),
        }
        for name, text in texts.items():
            with atomic_write(folder / name) as handle:
                handle.write(text.encode(errors="backslashreplace"))  # a name may contain bytes that are not text

    def csv(self) -> str:
        """Return one line per method and image; an empty cell is a missing value."""
        keys = [metric.key for metric in self.metrics.columns]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["method", "image", *keys, SECONDS, "note"])
        for row in self.rows:
            cells = [row.figures.get(key) for key in keys] + [row.seconds]
            rounded = ["" if cell is None else round(cell, 6) for cell in cells]
            writer.writerow([row.method, row.image, *rounded, row.note])
        return buffer.getvalue()

    def json(self) -> str:
        """Return means and counts of each method, metrics with licence and version, notes and settings."""
        methods = {
            name: {"images": s.images, "failed": s.failed, "means": finite(s.means), "counts": s.counts}
            for name, s in self.summary().items()
        }
        common = {name: {"images": s.images, "means": finite(s.means)} for name, s in self.summary(True).items()}
        document = {
            "settings": self.settings,
            "methods": methods,
            "common_images": common,
            "metrics": {metric.key: self.describe(metric) for metric in self.metrics.columns},
            "notes": self.notes,
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    def describe(self, metric: Metric) -> dict[str, str | None]:
        """Return the description of a metric; `refused` is None if it was measured."""
        return {
            "title": metric.title,
            "better": metric.better,
            "unit": metric.unit,
            "meaning": metric.meaning,
            "licence": metric.licence,
            "version": self.metrics.versions.get(metric.key, ""),
            "refused": self.metrics.refused.get(metric.key),
        }

    def markdown(self) -> str:
        """Return tables of the means and of the metrics, and the notes."""
        lines = ["# Results", "", *(f"- {key}: {value}" for key, value in self.settings.items()), ""]
        lines += markdown_table(self.headings(), self.cells())
        if self.uneven():
            lines += ["", f"{self.common_title()}:", ""]
            lines += markdown_table(self.headings(), self.cells(common=True))
        lines += ["", "## Metrics", ""]
        lines += markdown_table(ABOUT, self.about())
        lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """Return one self-contained page: means, a plot per metric, images, metrics and notes."""
        tables = [Table("Means", self.headings(), self.cells())]
        if self.uneven():
            tables.append(Table(self.common_title(), self.headings(), self.cells(common=True)))
        about = Table("Metrics", ABOUT, self.about())
        return page(self.settings, tables, self.charts(), self.gallery(), about, self.notes)

    def charts(self) -> list[Chart]:
        """Return a chart per measured metric: the value of every image and the mean, by method."""
        means = self.summary()
        return [
            Chart(
                f"{metric.title} {metric.unit} {arrow(metric)}",
                {m: [v for r in self.rows if r.method == m and (v := value(r, metric.key)) is not None] for m in means},
                {method: summary.means[metric.key] for method, summary in means.items()},
            )
            for metric in self.metrics.columns
            if metric.key in self.metrics.measures
        ]

    def gallery(self) -> Gallery:
        """Return the images with a thumbnail; the caption has the values of the method."""
        shown = {(row.image, row.method): (row.thumbnail, self.caption(row)) for row in self.rows}
        seen = {row.image for row in self.rows if row.thumbnail}
        return Gallery(self.methods, [name for name in self.images if name in seen], shown)

    def caption(self, row: Row) -> str:
        """Return the values of one row as a short text."""
        known = [(m, v) for m in self.metrics.columns if (v := row.figures.get(m.key)) is not None and m.unit != "%"]
        return ", ".join(f"{m.title} {number(m, v)}" for m, v in known) + (f" ({row.note})" if row.note else "")

    def about(self) -> list[list[str]]:
        """Return the table of metrics as text: meaning, version, licence, and why a metric was not measured."""
        versions, refused = self.metrics.versions, self.metrics.refused
        return [
            [m.title, m.meaning, versions.get(m.key, ""), m.licence, refused.get(m.key, "measured")]
            for m in self.metrics.columns
        ]

    def headings(self) -> list[str]:
        """Return the headings of the table of means."""
        columns = [" ".join(filter(None, (m.title, m.unit, arrow(m)))) for m in self.metrics.columns]
        return ["method", *columns, "s/image"]

    def cells(self, common: bool = False) -> list[list[str]]:
        """Return the table of means as text; a mean over fewer images than the row shows their number."""
        return [
            [method, *(figure(metric, s) for metric in self.metrics.columns), seconds(s)]
            for method, s in self.summary(common).items()
        ]

    def uneven(self) -> bool:
        """Whether values are missing for some images but not for all."""
        return 0 < len(self.common_images()) < len(self.images)

    def common_title(self) -> str:
        """Return the title of the table over `common_images`."""
        count = f"{len(self.common_images())} of {len(self.images)} images"
        return f"Means over the {count} for which every method has a value of every metric"

    def _summary(self, method: str, images: set[str]) -> Summary:
        rows = [row for row in self.rows if row.method == method and row.image in images]
        means: dict[str, float | None] = {}
        counts: dict[str, int] = {}
        for key in [*(metric.key for metric in self.metrics.columns), SECONDS]:
            known = [v for row in rows if (v := value(row, key)) is not None]
            means[key], counts[key] = fmean(known) if known else None, len(known)
        return Summary(len(rows), sum(row.failed for row in rows), means, counts)


def value(row: Row, key: str) -> float | None:
    """Return a value of a row, or its seconds."""
    return row.seconds if key == SECONDS else row.figures.get(key)


def finite(means: Mapping[str, float | None]) -> dict[str, float | str | None]:
    """Replace infinity (the PSNR of equal images) by the text "inf", because JSON has no infinity."""
    return {key: "inf" if v is not None and math.isinf(v) else v for key, v in means.items()}


def number(metric: Metric, figure: float) -> str:
    """Return a value as text, with the metric's digits."""
    shown = figure * 100 if metric.unit == "%" else figure
    return "∞" if math.isinf(shown) else f"{shown:.{metric.digits}f}"


def figure(metric: Metric, summary: Summary) -> str:
    """Return a mean as text, or "not measured" without a mean."""
    mean, count = summary.means[metric.key], summary.counts[metric.key]
    if mean is None:
        return "not measured"
    return number(metric, mean) + ("" if count == summary.images else f" ({count} of {summary.images})")


def seconds(summary: Summary) -> str:
    """Return the mean time as text."""
    mean = summary.means[SECONDS]
    return "" if mean is None else f"{mean:.2f}"


def arrow(metric: Metric) -> str:
    """Return an arrow in the direction of better values."""
    return "↑" if metric.better == "up" else "↓"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(cells) for cells in body)]
