"""Draw a benchmark with Pillow: a bar for each component and size."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pfstorer_rt.files import atomic_write
from pfstorer_rt.runtime.bench import BenchReport

WIDTH, ROW, LABEL, ROOM = 900, 28, 190, 210
"""Pixels: width of the image, height of a bar with its gap, space left of the bars, space right of them."""


def draw(path: Path, report: BenchReport) -> None:
    """Write a PNG of the medians on a logarithmic axis, with a line from p50 to the highest percentile of each row."""
    from math import log10

    rows = {**report.components_ms, **report.images_ms}
    low = 10 ** (int(log10(max(1e-3, min(r["p50"] for r in rows.values())))) - 1)
    span = log10(max(highest(r) for r in rows.values()) * 1.2 / low)
    image = Image.new("RGB", (WIDTH, ROW * (len(rows) + 3)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)

    def x(milliseconds: float) -> float:
        return LABEL + log10(max(milliseconds, low) / low) / span * (WIDTH - LABEL - ROOM)

    pen.text((8, 6), f"{report.backend} ({report.provider}), steps: {report.steps}", fill="black", font=font)
    for i, (name, figures) in enumerate(rows.items()):
        top = ROW * (i + 1) + 6
        pen.text((8, top), name, fill="black", font=font)
        pen.rectangle((LABEL, top, x(figures["p50"]), top + ROW - 10), fill="steelblue")
        middle = top + (ROW - 10) / 2
        end = x(highest(figures))
        pen.line((x(figures["p50"]), middle, end, middle), fill="black", width=2)
        rate = f", {figures['megapixels_per_s']:.2f} MP/s" if "megapixels_per_s" in figures else ""
        pen.text((end + 8, top), f"{figures['p50']:.1f} ms{rate}", fill="black", font=font)
    foot = f"bars: p50, logarithmic from {low:g} ms; lines: to p90 or p99. {report.machine['processor']}, "
    load = report.clock
    foot += f"{report.machine['cores']} cores, load {load['load_before']} to {load['load_after']}"
    pen.text((8, ROW * (len(rows) + 1) + 14), foot, fill="dimgray", font=font)
    with atomic_write(path) as file:
        image.save(file, "PNG")


def highest(figures: dict[str, float]) -> float:
    """Return the highest percentile of a measurement, in milliseconds."""
    return next(figures[key] for key in ("p99", "p90", "p50") if key in figures)
