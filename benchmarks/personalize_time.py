"""Measure the time to learn a person: `personalize`, `personalize --thorough` and `fix`, start of the process included.

    python benchmarks/personalize_time.py --command personalize --command fix -o benchmarks/results/personalize_time.csv

The photographs are those of the demo. Each run is a new process with a new data directory. One row for each command:
medians of all runs. `fix` also restores one image. OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import click
from common import machine, write
from startup import start

from pfstorer_rt.demo import reference_files

COMMANDS = ("personalize", "personalize --thorough", "fix")


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--command", "names", multiple=True, type=click.Choice(COMMANDS), help="[default: all]")
@click.option("--base", default="portrait", show_default=True)
@click.option("--runs", default=3, show_default=True)
def main(output: Path, names: tuple[str, ...], base: str, runs: int) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(runs):
        for name in names or COMMANDS:
            found.setdefault(name, []).append(measured(name, base))
            click.echo(f"{name}: {found[name][-1]}")
    rows = []
    for name, values in found.items():
        medians = {key: round(statistics.median(one[key] for one in values), 2) for key in values[0]}
        rows.append({"command": name, "base": base, **medians, "runs": runs, **machine()})
    write(output, rows)


def measured(name: str, base: str) -> dict[str, float]:
    """Run a command in a new process; returns seconds, processor time and peak memory."""
    photographs = reference_files()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PFSTORER_HOME"] = f"{folder}/home"
        person = Path(folder) / "person"
        person.mkdir()
        for path in photographs:
            shutil.copy(path, person)
        image = shutil.copy(photographs[0].with_name("original.jpg"), folder)
        rest = [image, "--person"] if name == "fix" else ["--identity", "person", *name.split()[1:]]
        return start([sys.executable, "-m", "pfstorer_rt", name.split()[0], "--base", base, *rest, f"{person}"], folder)


if __name__ == "__main__":
    main()
