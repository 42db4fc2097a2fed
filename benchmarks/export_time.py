"""Measure the command `export` of a first and a second identity of a base: seconds, processor time and peak memory.

    python benchmarks/export_time.py -o benchmarks/results/export_time.csv alice.safetensors bob.safetensors

Each command is a new process. The cache directory is empty before the first identity. --other measures another
installation, such as an earlier version, in turn with this one. One row for each installation, precision and identity:
medians of all runs. The rows are added to the file.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

import click
from common import machine, read, write
from startup import start

from pfstorer_rt.identity import Identity


@click.command()
@click.argument("identities", nargs=2, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), default="fp32", show_default=True)
@click.option("--other", type=(str, str), help="Name and Python of another installation.", metavar="NAME PYTHON")
@click.option("--runs", default=3, show_default=True)
def main(identities: tuple[Path, Path], output: Path, precision: str, other: tuple[str, str] | None, runs: int) -> None:
    installations = {"this version": sys.executable, **({other[0]: other[1]} if other else {})}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(runs):
        for name, python in installations.items():
            for order, measured in zip(("first", "second"), exports(python, identities, precision), strict=True):
                click.echo(f"{name}, {order}: {measured}")
                found.setdefault((name, order), []).append(measured)
    rows = read(output)
    for (name, order), measured in found.items():
        medians = {key: round(statistics.median(one[key] for one in measured), 2) for key in measured[0]}
        about = {"version": name, "base": Identity.load(identities[0]).base_name, "precision": precision}
        rows.append({**about, "identity": order, **medians, "runs": runs, **machine()})
    write(output, rows)


def exports(python: str, identities: tuple[Path, Path], precision: str) -> list[dict[str, float]]:
    """Export two identities, one after the other, with a new data and cache directory; returns their measurements."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PFSTORER_HOME"] = f"{folder}/home"
        call = [python, "-m", "pfstorer_rt", "export", "--target", "onnx", "--precision", precision, "--overwrite"]
        return [start([*call, "--identity", f"{one.resolve()}", "-o", "new.plan"], folder) for one in identities]


if __name__ == "__main__":
    main()
