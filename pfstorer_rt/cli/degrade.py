"""`pfstorer-rt degrade`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import click

from pfstorer_rt.cli.options import SEED


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUTS...")
@click.option("-o", "--output", required=True, help="File for one picture, folder for several; - is stdout.")
@click.option("--level", type=click.Choice(["light", "heavy"]), default="heavy", show_default=True)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Of the first picture; the next has seed + 1.",
)
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per picture.")
def command(inputs: tuple[str, ...], output: str, level: str, seed: int, overwrite: bool, as_json: bool) -> None:
    """Blur, shrink, add noise and compress pictures as old and bad ones are; the size stays.

    \b
    Example:
      pfstorer-rt degrade clean/ -o bad/ --level heavy --seed 1
    """
    from pfstorer_rt.cli.pictures import plan_jobs, show
    from pfstorer_rt.imaging.rows import Rows, Spool, read_pixels
    from pfstorer_rt.runtime.batch import Saving, run_jobs

    jobs = plan_jobs(inputs, output, "_degraded")
    import torch

    from pfstorer_rt.degradation.degrade import degrade

    def work(number: int, rows: Rows, step: Callable[[int, int], None]) -> Rows:
        image = torch.from_numpy(read_pixels(rows, 0, rows.height)).permute(2, 0, 1).contiguous()
        degraded = degrade(image, level, seed + number)
        return Spool.of((degraded.clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy())

    sys.exit(run_jobs(jobs, work, saving=Saving(overwrite), show=partial(show, as_json=as_json), title="degrade"))
