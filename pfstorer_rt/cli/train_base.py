"""`pfstorer-rt train-base`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click
from click.core import ParameterSource

from pfstorer_rt.cli.imports import fast_imports
from pfstorer_rt.cli.options import TRAINING, Number, flag, training_options
from pfstorer_rt.cli.threads import free_cores_only

if TYPE_CHECKING:
    from pfstorer_rt.training.train_stage import StageConfig

CROPS = {"wide", "variations", "level", "p_hq"}
FINISHING = ("first_step", "lambda_color", "lambda_face", "lambda_id", "lambda_perceptual", "lambda_pixel", "share")
LENGTH = {"iterations", "batch", "learning_rate", "workers"}
STAGES = {
    "base": {"preset", "weights", "weighting", "autoencoder_iterations", "crop", "first_step", *CROPS, *LENGTH},
    "wrapping": {*CROPS, *LENGTH},
    "finishing": {*FINISHING, *CROPS, *LENGTH},
    "reptile": {"iterations", "minutes"},
    "autoencoder": {"preset", "minutes", "tiles", "lpips", *LENGTH},
    "restorer": {"minutes", "tiles", *LENGTH},
    "one-step": {"minutes", "tiles", "lpips", *LENGTH},
    "people": {"people", "minutes", "tiles", "lpips", *LENGTH},
}
"""Stage -> parameters that only some stages have. The first three stages use crops, the last four tiles."""


@dataclass(frozen=True)
class Options:
    """The parsed options, under the names of the command's parameters."""

    stage: str
    preset: str
    prior: str | None
    weights: Literal["all", "conditions"] | None
    weighting: Literal["prediction", "x0"]
    autoencoder_iterations: int | None
    iterations: int | None
    minutes: float | None
    batch: int | None
    learning_rate: float | None
    crop: int | None
    wide: float | None
    variations: int | None
    level: Literal["light", "heavy", "mixed"]
    p_hq: float | None
    first_step: float | None
    lambda_color: float | None
    lambda_face: float | None
    lambda_id: float | None
    lambda_perceptual: float | None
    lambda_pixel: float | None
    share: float | None
    tiles: int
    lpips: Path | None
    people: tuple[Path, ...]
    workers: int
    seed: int
    precision: str
    device: str
    attention: str
    gradient_checkpointing: bool
    optimizer: str | None

    def values(self, *names: str) -> dict[str, Any]:
        """Return the options that replace defaults of a configuration: None keeps a default."""
        return {name: getattr(self, name) for name in names}

    def stage_config(self) -> StageConfig:
        """Return the settings of the stage."""
        from pfstorer_rt.config import changed
        from pfstorer_rt.training.base import BaseTrainConfig
        from pfstorer_rt.training.crops import CropConfig
        from pfstorer_rt.training.finishing import FinishingConfig
        from pfstorer_rt.training.reptile import ReptileConfig
        from pfstorer_rt.training.tile_stages import TileStageConfig
        from pfstorer_rt.training.wrapping import WrappingConfig

        common = self.values("batch", *TRAINING)
        length = self.values("iterations", "learning_rate")
        crops = changed(CropConfig(), **self.values("wide", "variations", "level", "p_hq"))
        if self.stage == "base":
            base = BaseTrainConfig(self.preset, crops=crops, weighting=self.weighting, weights=self.weights)
            return changed(
                base,
                autoencoder=changed(
                    base.autoencoder, iterations=self.autoencoder_iterations, workers=self.workers, **common
                ),
                restorer=changed(base.restorer, workers=self.workers, **length, **common),
                **self.values("crop", "first_step"),
            )
        if self.stage in ("wrapping", "finishing"):
            config = WrappingConfig(crops=crops) if self.stage == "wrapping" else FinishingConfig(crops=crops)
            train = changed(config.train, workers=self.workers, **length, **common)
            return changed(config, train=train, **(self.values(*FINISHING) if self.stage == "finishing" else {}))
        if self.stage == "reptile":
            settings = ReptileConfig(seed=self.seed, train=common)
            return changed(settings, people=self.iterations, minutes=self.minutes)
        stage = cast(Literal["autoencoder", "restorer", "one-step", "people"], self.stage)
        values = {**common, **length, "minutes": self.minutes}
        return TileStageConfig(
            stage, self.preset, self.tiles, self.lpips, people=self.people, workers=self.workers, train=values
        )


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PHOTOS...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the finished base.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of checkpoints. [default: OUTPUT.training]")
@click.option(
    "--preset",
    type=click.Choice(["nano", "tiny", "portrait", "sd21"]),
    default="portrait",
    show_default=True,
    help="Architecture of a new base. A base given with --prior keeps its own.",
)
@click.option(
    "--stage",
    type=click.Choice(list(STAGES)),
    default="base",
    show_default=True,
    help="What is trained. On crops of the photographs: base (the autoencoder, then the restorer; with --prior the "
    "restorer alone), wrapping (feature wrapping of the decoder), finishing (everything except the autoencoder, with "
    "losses on decoded images). On people: reptile (the prior of the personalization; PHOTOS are folders with a "
    "folder or a file for each person). On tiles composed of the photographs, one after the other: autoencoder, "
    "restorer, one-step, people (the base and its prior of the personalization).",
)
@click.option("--prior", help="Base to train further. Required by every stage except base and autoencoder.")
@click.option(
    "--weights",
    type=click.Choice(["all", "conditions"]),
    help="Stage base: trained weights of the restorer. conditions: SPADEs and structure encoder only. "
    "[default: conditions with --prior, else all]",
)
@click.option(
    "--weighting",
    type=click.Choice(["prediction", "x0"]),
    default="prediction",
    show_default=True,
    help="Stage base: space of the loss. x0 is the clean latent, which favours few steps.",
)
@click.option(
    "--autoencoder-iterations",
    type=click.IntRange(1),
    help="Stage base: iterations of the autoencoder. [default: 6000]",
)
@click.option(
    "--iterations",
    type=click.IntRange(1),
    help="Iterations of the stage; of the restorer in stage base; people in stage reptile. [default: 8000 on crops; "
    "130 in reptile; on tiles the stage's]",
)
@click.option(
    "--minutes", type=Number(0.1), help="Stages reptile and on tiles: length in minutes, instead of iterations."
)
@click.option("--batch", type=click.IntRange(2), help="Samples per iteration. [default: 16 on crops; on tiles 2 to 8]")
@click.option(
    "--learning-rate",
    type=Number(),
    help="Learning rate of the stage; of the restorer in stage base. [default: 5e-4 on crops; on tiles 6e-4, in "
    "one-step 3e-4, in people 1.5e-4]",
)
@click.option(
    "--crop", type=click.IntRange(16), help="Stage base: side of the autoencoder's crops in pixels. [default: 128]"
)
@click.option(
    "--wide",
    type=Number(1, 2),
    help="Stages on crops: crop up to N times the short side, with mirrored padding. [default: 1]",
)
@click.option(
    "--variations", type=click.IntRange(1), help="Stages on crops: degraded pairs per photograph. [default: 1]"
)
@click.option(
    "--level",
    type=click.Choice(["light", "heavy", "mixed"]),
    default="heavy",
    show_default=True,
    help="Stages on crops: strength of the degradation.",
)
@click.option(
    "--p-hq",
    type=Number(0, 1),
    help="Stages on crops: share of pairs without degradation. [default: 0.03]",
)
@click.option(
    "--first-step",
    type=Number(0, 1),
    help="Stages base and finishing: share of samples at timestep 999, where restoring starts. [default: 0]",
)
@click.option("--lambda-color", type=Number(0), help="Stage finishing: weight of the colour loss. [default: 0]")
@click.option(
    "--lambda-face",
    type=Number(0),
    help="Stage finishing: weight of the distance between the recognizer's features of faces. [default: 0]",
)
@click.option("--lambda-id", type=Number(0), help="Stage finishing: weight of the identity loss. [default: 0.3]")
@click.option("--lambda-perceptual", type=Number(0), help="Stage finishing: weight of ST-LPIPS. [default: 0.2]")
@click.option("--lambda-pixel", type=Number(0), help="Stage finishing: weight of the pixel error. [default: 0.5]")
@click.option(
    "--share",
    type=Number(0, 1),
    help="Stage finishing: interpolation of the result between the weights of the prior (0) and the trained ones (1). "
    "[default: 0.5]",
)
@click.option(
    "--tiles", type=click.IntRange(16), default=2000, show_default=True, help="Stages on tiles: number of tiles."
)
@click.option(
    "--lpips",
    type=click.Path(exists=True, path_type=Path),
    help="Stages autoencoder, one-step and people: NPZ file with the LPIPS weights.",
)
@click.option(
    "--people",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Stage people: folder with one folder of photographs for each person. Repeat the option for several such "
    "folders.",
)
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes that prepare batches.")
@training_options
def command(photos: tuple[Path, ...], output: Path, work: Path | None, **parameters: Any) -> None:
    """Train a base on photographs. One call trains one stage; the default stage makes a new base.

    On tiles, a folder of photographs may have a weight: FOLDER=WEIGHT is its share of the tiles.
    Run the same command again to resume an interrupted training. `accelerate launch -m pfstorer_rt train-base ...`
    trains on several devices.

    \b
    Examples:
      pfstorer-rt train-base photos/ -o my-base
      pfstorer-rt train-base photos/ -o better --prior portrait --stage one-step --lpips lpips_vgg16.npz

    \b
    The shipped base, from nothing (`docs/training.md`):
      pfstorer-rt train-base photos/ -o first --stage autoencoder --lpips lpips_vgg16.npz
      pfstorer-rt train-base photos/ -o second --prior first --stage restorer
      pfstorer-rt train-base photos/ -o base --prior second --stage one-step --lpips lpips_vgg16.npz
    """
    options = Options(**parameters)
    check_options(options, click.get_current_context())
    from pfstorer_rt.console import echo, note, stage_bars

    with free_cores_only(), fast_imports():
        from pfstorer_rt.models.base import load_base
        from pfstorer_rt.training.train_stage import train_stage

    work = work or output.with_name(output.name + ".training")
    prior = load_base(options.prior) if options.prior else None
    with stage_bars() as on_progress:
        base = train_stage(photos, output, options.stage_config(), work, prior, on_progress, note)
    echo(f"{output}: base {base.config.name}, fingerprint {base.fingerprint[:12]}")
    echo(f"{work} contains checkpoints and samples of this training; delete it if you do not need them", err=True)


def check_options(options: Options, context: click.Context) -> None:
    """Raise `click.UsageError` for a missing prior, and for an option that the stage does not have."""
    if options.stage not in ("base", "autoencoder") and not options.prior:
        raise click.UsageError(f"--stage {options.stage} needs --prior, the base that it trains further")
    foreign = {name for own in STAGES.values() for name in own} - STAGES[options.stage]
    for name in sorted(foreign):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            stages = ", ".join(stage for stage, own in STAGES.items() if name in own)
            raise click.UsageError(f"{flag(name)} is not an option of the stage {options.stage}, but of: {stages}")
