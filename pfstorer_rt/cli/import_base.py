"""`pfstorer-rt import-base`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="CKPT")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new base.")
@click.option("--sd", metavar="DIR|HUB_ID", help="SD 2.1-base, for checkpoints of StableSR's own parts alone.")
@click.option("--dtype", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
@click.option("--prediction-type", type=click.Choice(["epsilon", "v_prediction"]), help="[default: by the file's name]")
@click.option("--overwrite", is_flag=True, help="Replace a base that exists.")
def command(
    checkpoint: Path, output: Path, sd: str | None, dtype: str, prediction_type: str | None, overwrite: bool
) -> None:
    """Turn a StableSR checkpoint into a base directory; pickled code in it is never run.

    \b
    Examples:
      pfstorer-rt import-base stablesr_000117.ckpt -o stablesr
      pfstorer-rt import-base webui_768v_139.ckpt --sd stable-diffusion-2-1-base/ -o stablesr-768
    """
    from pfstorer_rt.errors import PFStorerError

    if (output / "config.json").exists() and not overwrite:
        raise PFStorerError(f"{output}: a base exists there; choose another name or pass --overwrite")
    import torch

    from pfstorer_rt.models.checkpoint import import_base

    base = import_base(
        checkpoint, output, sd, {"fp16": torch.float16, "fp32": torch.float32}[dtype], prediction_type
    )
    click.echo(f"{output}: base {base.config.name}, {base.config.prediction_type}, fingerprint {base.fingerprint[:12]}")
    click.echo(f"licence of the weights: {base.config.licence}")
