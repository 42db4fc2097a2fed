"""One HTML page of tables, plots and images: a single file without scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from pfstorer_rt.faces.dlib import to_uint8
from pfstorer_rt.imaging.rows import Pixels

THUMBNAILS = 24
"""Number of images on a page; a page with more images opens slowly."""
THUMBNAIL_SIDE = 192
"""Longer side of an image on a page, in pixels."""
_LABEL, _PLOT, _LINE = 120, 300, 22  # of a chart, in pixels
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.7rem; text-align: left; vertical-align: top; }
figure { margin: 0; width: 192px; font-size: 11px; }
figure img { width: 100%; display: block; background: #eee; }
.row { display: flex; gap: 8px; margin: 0.3rem 0 1.2rem; overflow-x: auto; }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; }
svg text { font: 12px system-ui, sans-serif; }
"""


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A line per method, with a dot per image and the mean."""

    title: str
    dots: Mapping[str, Sequence[float]]
    means: Mapping[str, float | None]


@dataclass(frozen=True)
class Gallery:
    """Images side by side, with a line per original."""

    methods: Sequence[str]
    images: Sequence[str]
    shown: Mapping[tuple[str, str], tuple[bytes, str]]
    """(image, method) -> JPEG and caption; the JPEG is empty without an image."""


def page(
    settings: Mapping[str, object],
    tables: Sequence[Table],
    charts: Sequence[Chart],
    gallery: Gallery,
    about: Table,
    notes: Sequence[str],
) -> str:
    """Return the page, with all texts escaped."""
    facts = "".join(f"<li>{escape(str(key))}: {escape(str(value))}</li>" for key, value in settings.items())
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    parts = [
        f"<h1>Results</h1><ul>{facts}</ul>",
        *(html_table(table) for table in tables),
        '<h2>Plots</h2><p>A dot is an image, a bar the mean.</p><div class="charts">',
        *(svg_chart(chart) for chart in charts),
        "</div>",
        html_gallery(gallery),
        html_table(about),
        f"<h2>Notes</h2><ul>{remarks}</ul>" if notes else "",
    ]
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Results</title><style>{_STYLE}</style>'
    return head + "</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def thumbnail(pixels: Pixels, side: int = THUMBNAIL_SIDE) -> bytes:
    """Return a JPEG of (H, W, 3) in [0, 1], with a longer side of at most `side` pixels."""
    image = Image.fromarray(to_uint8(np.nan_to_num(pixels)))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


def html_table(table: Table) -> str:
    """Return a table with its title."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.body)
    return f"<h2>{escape(table.title)}</h2><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def html_gallery(gallery: Gallery) -> str:
    """Return all images; an image without data is an empty cell with a caption."""
    lines = ["<h2>Images</h2>"] if gallery.images else []
    for name in gallery.images:
        cells = []
        for method in gallery.methods:
            data, caption = gallery.shown.get((name, method), (b"", ""))
            source = base64.b64encode(data).decode()
            image = f'<img alt="{escape(name)}, {escape(method)}" src="data:image/jpeg;base64,{source}">'
            text = f"<b>{escape(method)}</b> {escape(caption)}"
            cells.append(f"<figure>{image if data else ''}<figcaption>{text}</figcaption></figure>")
        lines.append(f'<h3>{escape(name)}</h3><div class="row">{"".join(cells)}</div>')
    return "\n".join(lines)


def svg_chart(chart: Chart) -> str:
    """Return a chart as inline SVG; infinite values (PSNR of equal images) are left out."""
    finite = [v for values in chart.dots.values() for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    methods = list(chart.dots)
    height = _LINE * (len(methods) + 2)

    def x(figure: float) -> float:
        return _LABEL + 8 + (_PLOT - 16) * (0.5 if high == low else (figure - low) / (high - low))

    shapes = [f'<text x="0" y="15" font-weight="bold">{escape(chart.title)}</text>']
    for number, method in enumerate(methods):
        y = _LINE * (number + 1) + _LINE / 2
        shapes.append(f'<text x="0" y="{y + 4:.0f}">{escape(shorten(method))}</text>')
        shapes.append(f'<line x1="{_LABEL}" x2="{_LABEL + _PLOT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        known = [v for v in chart.dots[method] if math.isfinite(v)]
        shapes += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3" fill="#4477aa" fill-opacity="0.35"/>' for v in known]
        mean = chart.means.get(method)
        if mean is not None and math.isfinite(mean):
            shapes.append(f'<rect x="{x(mean) - 1.5:.1f}" y="{y - 8}" width="3" height="16" fill="#cc3311"/>')
    for anchor, place, figure in (("start", _LABEL, low), ("end", _LABEL + _PLOT, high)):
        text = f"{figure:.4g}" if finite else ""
        shapes.append(f'<text x="{place}" y="{height - 6}" text-anchor="{anchor}" fill="#666">{text}</text>')
    width = _LABEL + _PLOT
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(shapes)}</svg>'


def shorten(text: str, length: int = 16) -> str:
    """Shorten a name to the width of a chart's label."""
    return text if len(text) <= length else text[: length - 1] + "…"
