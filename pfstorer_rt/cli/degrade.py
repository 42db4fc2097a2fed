"""`pfstorer-rt degrade`."""

from __future__ import annotations

import sys
from functools import partial

import click

from pfstorer_rt.cli.options import SEED, check_stdout


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUTS...")
@click.option("-o", "--output", required=True, help="File for one image, folder for several, - for stdout.")
@click.option(
    "--level",
    type=click.Choice(["light", "heavy"]),
    default="heavy",
    show_default=True,
    help="Strength of the degradation.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Random seed of the first image; the next image uses seed + 1.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing results.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
def command(inputs: tuple[str, ...], output: str, level: str, seed: int, overwrite: bool, as_json: bool) -> None:
    """Degrade images: add the blur, noise, downscaling and compression of old photographs. The size stays.

    \b
    Example:
      pfstorer-rt degrade clean/ -o bad/ --level heavy --seed 1
    """
    check_stdout(inputs, output)
    from pfstorer_rt.cli.outcomes import conclude, show
    from pfstorer_rt.cli.progress import batch_bars
    from pfstorer_rt.console import note
    from pfstorer_rt.runtime.batch import Saving
    from pfstorer_rt.runtime.degrading import degrade_files

    report = partial(show, as_json=as_json, command=click.get_current_context().command)
    with batch_bars("degrade") as progress:
        outcomes = degrade_files(inputs, output, level, seed, Saving(overwrite), report, progress, note)
    sys.exit(conclude(outcomes, as_json))
