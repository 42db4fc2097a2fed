"""Draw the loss curves of the shipped base from the CSV files of `train-base`.

python benchmarks/curves.py benchmarks/results/train_*.csv -o docs/training_curves.svg
"""

from __future__ import annotations

import csv
from pathlib import Path

import click
import numpy as np

WIDTH, HEIGHT, MARGIN = 360, 200, 40
SMOOTH = 9
"""Logged values (one per 50 iterations) whose mean is one point of the line."""


@click.command()
@click.argument("logs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(logs: tuple[Path, ...], output: Path) -> None:
    plots = [plot(path, i) for i, path in enumerate(logs)]
    size = f'width="{WIDTH * len(logs)}" height="{HEIGHT + 20}"'
    style = 'font-family="sans-serif" font-size="11"'
    output.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(plots) + "\n</svg>\n")


def plot(path: Path, place: int) -> str:
    """Return one curve with a logarithmic axis of the loss."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    iterations = np.array([float(r["iteration"]) for r in rows])
    losses = np.array([float(next(v for k, v in r.items() if k in ("loss", "l1"))) for r in rows])
    smooth = np.convolve(losses, np.ones(SMOOTH) / SMOOTH, "valid") if len(losses) >= SMOOTH else losses
    at = iterations[-len(smooth) :]
    low, high = np.log(smooth.min()), np.log(smooth.max())
    x = MARGIN + (WIDTH - 2 * MARGIN) * at / at.max()
    y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (np.log(smooth) - low) / max(high - low, 1e-9)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<g transform="translate({WIDTH * place} 0)"><text x="{MARGIN}" y="20">{path.stem.replace("_", " ")}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 12}">0</text><text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end">'
        f'{at.max():.0f} iterations</text><text x="2" y="{MARGIN + 4}">{smooth.max():.3f}</text>'
        f'<text x="2" y="{HEIGHT - MARGIN}">{smooth.min():.3f}</text>'
        f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1.5"/></g>'
    )


if __name__ == "__main__":
    main()
