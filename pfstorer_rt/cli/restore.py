"""`pfstorer-rt restore`."""

from __future__ import annotations

import sys
from typing import Any

import click

from pfstorer_rt.image import MAX_PIXELS


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUTS...")
@click.option("--engine", type=click.Path(), help="Plan file made by `pfstorer-rt export`.")
@click.option("--base", help="Run a base in PyTorch: tiny, or a base directory.")
@click.option("--identity", help="With --base: an identity, by name or file.")
@click.option("-o", "--output", help="File for one picture, folder for several; - is stdout.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Diffusion steps. [default: the engine's own]")
@click.option("--sampler", type=click.Choice(["ddpm", "ddim", "dpmpp_2m", "unipc"]), help="[default: the engine's own]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same bytes.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Of the identity: 0 is the base.")
@click.option("--cfw-weight", type=float, default=0.0, show_default=True, help="Of the LQ picture in the decoder.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Size of the result.")
@click.option("--color-fix", type=click.Choice(["auto", "adain", "wavelet", "none"]), default="auto", show_default=True)
@click.option(
    "--init",
    type=click.Choice(["lq", "noise"]),
    default="lq",
    show_default=True,
    help="Where sampling starts.",
)
@click.option("--eta", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Fresh noise in DDIM.")
@click.option("--overlap", type=int, help="Pixels shared by tiles. [default: half a tile]")
@click.option("--tile-batch", type=click.IntRange(1), default=4, show_default=True, help="Tiles computed at once.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "onnxruntime", "openvino", "tensorrt"]),
    default="auto",
    show_default=True,
)
@click.option("--trust-plan", is_flag=True, help="Run a TensorRT plan (executable code) that others built.")
@click.option("--max-pixels", type=click.IntRange(1), default=MAX_PIXELS, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per picture.")
def command(
    inputs: tuple[str, ...], engine: str | None, base: str | None, identity: str | None, **options: Any
) -> None:
    """Restore pictures: files, folders (recursive), globs, or - for stdin.

    \b
    Examples:
      pfstorer-rt restore --engine alice.plan old.jpg -o restored.png
      pfstorer-rt restore --engine alice.plan scans/ -o restored/ --json
      pfstorer-rt restore --base tiny old.jpg --steps 4
    """
    if (engine is None) == (base is None) and options["backend"] != "torch":
        raise click.UsageError("give either --engine FILE.plan or --base tiny|DIR")
    if engine is None and base is None:
        raise click.UsageError("give --engine FILE.plan or --base tiny|DIR")
    if identity and engine:
        raise click.UsageError("--identity goes with --base; a plan holds its identity already")
    from pfstorer_rt.cli.pictures import plan_jobs, run_jobs

    jobs = plan_jobs(inputs, options["output"], "_restored")
    from pfstorer_rt.config import RestoreConfig, TileConfig
    from pfstorer_rt.restore import Restorer

    config = RestoreConfig(
        steps=options["steps"], sampler=options["sampler"], seed=options["seed"], strength=options["strength"],
        cfw_weight=options["cfw_weight"], scale=options["scale"], color_fix=options["color_fix"],
        init=options["init"], eta=options["eta"],
        tile=TileConfig(overlap=options["overlap"], batch=options["tile_batch"]),
    )  # fmt: skip
    if engine is None:
        if options["backend"] not in ("auto", "torch"):
            raise click.UsageError("--base runs in PyTorch; export a plan to use another backend")
        restorer = Restorer.from_base(base, identity)
    else:
        restorer = Restorer.from_plan(engine, options["backend"], base, options["trust_plan"])
    with restorer:
        restorer.check(config)
        click.echo(f"{restorer.backend} on {restorer.provider}", err=True)
        facts = {
            "seed": config.seed, "steps": restorer.steps(config), "sampler": restorer.sampler(config),
            "strength": config.strength, "backend": restorer.backend, "provider": restorer.provider,
        }  # fmt: skip
        status = run_jobs(
            jobs, lambda _, pixels, step: restorer.restore(pixels, config, step), overwrite=options["overwrite"],
            as_json=options["as_json"], title="restore", max_pixels=options["max_pixels"], facts=lambda: facts,
        )  # fmt: skip
    sys.exit(status)
