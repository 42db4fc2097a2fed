"""`pfstorer-rt import-base`."""

from __future__ import annotations

from pathlib import Path

import click

from pfstorer_rt.console import echo


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="CKPT")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new base.")
@click.option("--cfw", type=click.Path(path_type=Path), help="Checkpoint of the feature-wrapping decoder.")
@click.option(
    "--vae", metavar="taesd|DIR|HUB_ID", help="Tiny autoencoder of SD's latent space, to replace SD's own: faster."
)
@click.option("--sd", metavar="DIR|HUB_ID", help="SD 2.1-base, for checkpoints that contain only StableSR's own parts.")
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Stored type of the weights.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction"]),
    help="Prediction of the denoiser; no checkpoint states it. [required]",
)
@click.option(
    "--tile", type=click.Choice(["512", "768"]), help="Side of a tile in pixels. [default: from the file name]"
)
@click.option("--overwrite", is_flag=True, help="Replace an existing base.")
def command(
    checkpoint: Path,
    output: Path,
    cfw: Path | None,
    vae: str | None,
    sd: str | None,
    dtype: str,
    prediction_type: str | None,
    tile: str | None,
    overwrite: bool,
) -> None:
    """Convert a StableSR checkpoint to a base directory. Pickled code in the checkpoint is never run.

    \b
    Examples:
      pfstorer-rt import-base stablesr_000117.ckpt --prediction-type epsilon -o stablesr
      pfstorer-rt import-base webui_768v_139.ckpt --prediction-type v_prediction --sd sd-2-1-base/ -o stablesr-768
    """
    from pfstorer_rt.errors import PFStorerError

    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise PFStorerError(
            f"{output}: the folder is not empty; choose another name or allow overwriting", setting="overwrite"
        )
    import torch

    from pfstorer_rt.models.stablesr.importing import import_base

    types = {"fp16": torch.float16, "fp32": torch.float32}
    made = import_base(
        checkpoint, output, sd, types[dtype], prediction_type, cfw=cfw, vae=vae, tile=(tile and int(tile)) or None
    )
    c = made.config
    decoder = "feature wrapping" if c.cfw else "no feature wrapping"
    echo(
        f"{output}: base {c.name}, {c.prediction_type}, tiles of {c.tile} pixels, {decoder}, fingerprint "
        f"{made.fingerprint[:12]}"
    )
    if made.from_name:
        told = ", ".join(f"{name} {value}" for name, value in made.from_name.items())
        echo(f"from the file name {checkpoint.name}: {told}; change with --tile")
    echo(f"licence of the weights: {c.licence}")
