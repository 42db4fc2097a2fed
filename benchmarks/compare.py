"""Compare a plan with PyTorch on every backend that runs it on this machine.

    python benchmarks/compare.py PLAN... [--identity NAME|FILE] [--base NAME|DIR] -o benchmarks/results/compare.csv

Rows: each component on a photograph and on flat and noisy tiles, for each pair of backends (largest and mean absolute
difference, cosine distance), and the PSNR of the restored image against PyTorch's. The exit status is 1 for a value
that is not finite, and for an image under 45 dB.
"""

from __future__ import annotations

import csv
from pathlib import Path

import click
from common import machine
from pfstorer_rt.export.compare import check_rows, compare_plan

from pfstorer_rt.plan import Plan


@click.command()
@click.argument("plans", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--identity")
@click.option("--base")
@click.option("--trust-plan", is_flag=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(plans: tuple[Path, ...], identity: str | None, base: str | None, trust_plan: bool, output: Path) -> None:
    columns = ["target", "precision", "component", "tile", "pair", "finite", "max", "mean", "cosine_distance", "psnr"]
    rows = []
    for path in plans:
        plan = Plan.open(path, trust_plan)
        about = {"target": plan.manifest.target, "precision": plan.manifest.precision}
        rows += [{**about, **row, **machine()} for row in compare_plan(plan, identity, base or plan.manifest.base_name)]
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *machine()])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        click.echo("  ".join(f"{cell:.2e}" if isinstance(cell, float) else str(cell) for cell in cells))
    check_rows(rows)


if __name__ == "__main__":
    main()
