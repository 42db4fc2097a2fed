"""Convert the printed log of the shipped base's training on a GPU to CSV: the losses, and the results on other people.

    python benchmarks/training_log.py train.log --hardware "NVIDIA H100, torch 2.11" \
        -o benchmarks/results/portrait_gpu.csv --people benchmarks/results/portrait_gpu_people.csv

`seconds` counts from the start of the process. `samples_per_s` is the mean since the start of the stage. The last row
has the number of iterations, and no losses. The second file compares the input, the base, and the base with references
of the person (`known`) and of other people (`others`), before and after the training, on generated people who are in no
training; `lpips_vgg` and `dlib` are distances.
"""

from __future__ import annotations

import re
from pathlib import Path

import click
from common import write

Row = dict[str, str]
STEP = re.compile(r"\s*(?P<seconds>[\d.]+)s (?P<stage>autoencoder|matching|joint) (?P<iteration>\d+) (?P<losses>.*)")
END = re.compile(r"joint: (?P<iteration>\d+) iterations, (?P<samples>\d+) samples, (?P<duration>\d+) s")
LOSS = re.compile(r"([a-z][a-z_0-9]*) (-?[\d.]+(?:e-?\d+)?)(?= |$)")
SPEED = re.compile(r" (\d+)/s ")
RESULT = re.compile(
    r"\s*(?P<when>before|after) (?P<level>[a-z]+)(?P<sf>\d+) (?P<method>\w+) "
    r"psnr (?P<psnr>[\d.]+) lpips-vgg (?P<lpips_vgg>[\d.]+) dlib (?P<dlib>[\d.]+)"
)


@click.command()
@click.argument("log", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--people", type=click.Path(path_type=Path), help="CSV file for the results on other people.")
@click.option("--hardware", required=True, help="GPU and version of torch.")
def main(log: Path, output: Path, people: Path | None, hardware: str) -> None:
    text = log.read_text()
    write(output, steps(text, hardware))
    if people is not None:
        write(people, results(text, hardware))


def steps(text: str, hardware: str) -> list[Row]:
    """Return a row for each logged iteration; a loss that a stage does not have is empty."""
    rows: list[Row] = []
    for line in text.splitlines():
        if not (found := STEP.match(line)):
            continue
        speed = SPEED.search(found["losses"])
        about = {name: found[name] for name in ("stage", "iteration", "seconds")}
        rows.append({**about, "samples_per_s": speed[1] if speed else "", **dict(LOSS.findall(found["losses"]))})
    for found in END.finditer(text):
        speed = round(int(found["samples"]) / int(found["duration"]))
        rows.append({"stage": "joint", "iteration": found["iteration"], "samples_per_s": str(speed)})
    names = dict.fromkeys(name for row in rows for name in row)
    return [{**{name: row.get(name, "") for name in names}, "hardware": hardware} for row in rows]


def results(text: str, hardware: str) -> list[Row]:
    """Return a row for each result on people who are in no training."""
    found = [match for line in text.splitlines() if (match := RESULT.match(line))]
    return [{**match.groupdict(), "hardware": hardware} for match in found]


if __name__ == "__main__":
    main()
