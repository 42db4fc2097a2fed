"""`pfstorer-rt train-base`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from pfstorer_rt.cli.options import SEED, Number

PARTS = ("autoencoder", "restorer", "one-step")
"""Parts of a training on tiles."""


@dataclass(frozen=True)
class Options:
    """The parsed options, under the names of the command's parameters."""

    preset: str
    prior: str | None
    trained: Any  # a stage, or a group of weights
    weighting: Literal["prediction", "x0"]
    autoencoder_iterations: int | None
    iterations: int | None
    batch: int | None
    crop: int | None
    wide: float | None
    variations: int | None
    level: Literal["light", "heavy", "mixed"]
    p_hq: float | None
    first_step: float | None
    lambda_id: float | None
    lambda_perceptual: float | None
    lambda_pixel: float | None
    share: float | None
    learning_rate: float | None
    minutes: float | None
    tiles: int
    lpips: Path | None
    seed: int
    precision: str
    device: str
    workers: int


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PHOTOS...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the finished base.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of checkpoints. [default: OUTPUT.training]")
@click.option(
    "--preset",
    type=click.Choice(["nano", "tiny", "portrait", "sd21"]),
    default="tiny",
    show_default=True,
    help="Architecture of the base.",
)
@click.option("--prior", help="Base to start from; its autoencoder is not trained.")
@click.option(
    "--train",
    "trained",
    type=click.Choice(["auto", "all", "conditions", "wrapping", "finishing", *PARTS]),
    default="auto",
    show_default=True,
    help="What is trained. all: the whole restorer. conditions: SPADEs and structure encoder only. auto: conditions "
    "with --prior, else all. wrapping: feature wrapping of the decoder only. finishing: everything, with image-space "
    "losses. autoencoder, restorer, one-step: the three parts of a training on tiles (docs/training.md).",
)
@click.option(
    "--weighting",
    type=click.Choice(["prediction", "x0"]),
    default="prediction",
    show_default=True,
    help="Space of the loss: the prediction, or the clean latent (x0), which favours few steps.",
)
@click.option(
    "--autoencoder-iterations",
    type=click.IntRange(1),
    help="Iterations of the autoencoder. [default: the shipped base's]",
)
@click.option("--iterations", type=click.IntRange(1), help="Iterations of the restorer. [default: the shipped base's]")
@click.option("--batch", type=click.IntRange(2), help="Samples per iteration. [default: 16]")
@click.option("--crop", type=click.IntRange(16), help="Side of the autoencoder's crops in pixels. [default: 128]")
@click.option(
    "--wide", type=Number(1, 2), help="Crop up to N times the short side, with mirrored padding. [default: 1]"
)
@click.option("--variations", type=click.IntRange(1), help="Degraded pairs per photograph. [default: 2]")
@click.option(
    "--level",
    type=click.Choice(["light", "heavy", "mixed"]),
    default="heavy",
    show_default=True,
    help="Strength of the degradation.",
)
@click.option("--p-hq", type=Number(0, 1), help="Share of pairs without degradation. [default: 0.03]")
@click.option("--first-step", type=Number(0, 1), help="Share of samples at timestep 999. [default: 0]")
@click.option("--lambda-id", type=Number(0), help="Weight of the identity loss in finishing. [default: 0.3]")
@click.option("--lambda-perceptual", type=Number(0), help="Weight of ST-LPIPS in finishing. [default: 0.2]")
@click.option("--lambda-pixel", type=Number(0), help="Weight of the pixel error in finishing. [default: 0.5]")
@click.option(
    "--share",
    type=Number(0, 1),
    help="Interpolation of the result between the weights of the prior (0) and the finished ones (1). [default: 0.5]",
)
@click.option("--learning-rate", type=Number(), help="Learning rate of the restorer. [default: 5e-4]")
@click.option("--minutes", type=Number(0.1), help="Length of a part on tiles in minutes, instead of iterations.")
@click.option(
    "--tiles",
    type=click.IntRange(16),
    default=2000,
    show_default=True,
    help="Number of tiles that a part on tiles prepares.",
)
@click.option("--lpips", type=click.Path(exists=True, path_type=Path), help="NPZ file with the LPIPS weights.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Precision of the training; auto: bf16 where the device computes it natively, else fp32.",
)
@click.option("--device", default="auto", show_default=True, help="Device: auto, cpu or cuda.")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes that prepare batches.")
def command(photos: tuple[Path, ...], output: Path, work: Path | None, **parameters: Any) -> None:
    """Train a base on photographs: an autoencoder, then the restorer on degraded pairs.

    Run the same command again to resume an interrupted training. `accelerate launch -m pfstorer_rt.cli train-base ...`
    trains on several devices.

    \b
    Example:
      pfstorer-rt train-base photos/ -o my-base
    """
    options = Options(**parameters)
    if options.trained in PARTS:
        train_on_tiles(photos, output, work or output.with_name(output.name + ".training"), options)
        return
    from dataclasses import replace

    part: Any = options.trained if options.trained in ("wrapping", "finishing") else None
    if part and not options.prior:
        raise click.UsageError(f"--train {part} needs --prior, the base to train")
    from pfstorer_rt.config import changed
    from pfstorer_rt.console import say, stage_bars
    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.training.base import BaseTrainConfig
    from pfstorer_rt.training.stages import train_stage

    common = {k: getattr(options, k) for k in ("batch", "seed", "precision", "device", "workers")}
    squares = ("preset", "crop", "wide", "variations", "p_hq", "first_step")
    weights = ("lambda_id", "lambda_perceptual", "lambda_pixel", "share")
    config = BaseTrainConfig()
    config = replace(
        changed(config, **{k: getattr(options, k) for k in squares + weights}),
        level=options.level,
        trained="auto" if part else options.trained,
        weighting=options.weighting,
        autoencoder=changed(config.autoencoder, iterations=options.autoencoder_iterations, **common),
        restorer=changed(config.restorer, iterations=options.iterations, learning_rate=options.learning_rate, **common),
    )
    work = work or output.with_name(output.name + ".training")
    prior = load_base(options.prior) if options.prior else None
    with stage_bars() as on_progress:
        base = train_stage(part or "restorer", photos, output, config, work, prior, on_progress)
    say(f"{output}: base {base.config.name}, fingerprint {base.fingerprint[:12]}; {work} can be deleted")


def train_on_tiles(photos: tuple[Path, ...], output: Path, work: Path, options: Options) -> None:
    """Train one part of a base on tiles."""
    if options.trained != "autoencoder" and not options.prior:
        raise click.UsageError(f"--train {options.trained} needs --prior, the base of the previous part")
    from pfstorer_rt.console import say, stage_bars
    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.training.parts import PartConfig, train_part

    names = ("iterations", "minutes", "batch", "learning_rate", "seed", "precision", "device")
    config = PartConfig(
        options.trained,
        preset=options.preset,
        tiles=options.tiles,
        lpips=options.lpips,
        workers=options.workers,
        train={name: getattr(options, name) for name in names},
    )
    prior = load_base(options.prior) if options.prior else None
    with stage_bars() as on_progress:
        base = train_part([str(photo) for photo in photos], output, config, work, prior, on_progress)
    say(f"{output}: base {base.config.name}, fingerprint {base.fingerprint[:12]}; {work} can be deleted")
