"""`pfstorer-rt personalize`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pfstorer_rt.cli.imports import fast_imports
from pfstorer_rt.cli.options import TRAINING, NewFile, Number, check_new, training_options
from pfstorer_rt.cli.threads import free_cores_only
from pfstorer_rt.errors import SettingError

if TYPE_CHECKING:
    from pfstorer_rt.config import BaseConfig, PersonalizeConfig

TRAIN = ("iterations", "batch", "learning_rate", *TRAINING)
OWN = (
    *("method", "lambda_gen", "lambda_pixel", "lambda_color", "lambda_perceptual", "lambda_id", "lambda_face"),
    *("first_step", "rank", "ref_source", "framing", "keep_all"),
)
"""Parameters that are fields of `PersonalizeConfig`."""


@dataclass(frozen=True)
class Options:
    """The parsed options, under the names of the command's parameters."""

    base: str
    method: str
    instant: bool
    thorough: bool
    recipe: Literal["base", "paper"]
    iterations: int | None
    batch: int | None
    learning_rate: float | None
    lambda_gen: float | None
    first_step: float | None
    lambda_pixel: float | None
    lambda_color: float | None
    lambda_perceptual: float | None
    lambda_id: float | None
    lambda_face: float | None
    rank: int
    ref_source: str
    framing: str
    keep_all: bool
    contact_sheet: Path | None
    seed: int
    precision: str
    device: str
    attention: str
    gradient_checkpointing: bool
    optimizer: str | None
    output: Path | None
    overwrite: bool
    finish: bool
    as_json: bool

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the options that replace defaults of a configuration."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def config(self, base: BaseConfig) -> PersonalizeConfig:
        """Return the settings of the training on a base."""
        from pfstorer_rt.config import PersonalizeConfig, TrainConfig

        train, own = self.given(TRAIN), self.given(OWN)
        if self.recipe == "paper":
            config = PersonalizeConfig(train=TrainConfig(**train), **own)
        else:
            config = PersonalizeConfig.for_base(base, train, **own)
        if self.instant:
            return replace(config, train=replace(config.train, iterations=0))
        return config.thorough() if self.thorough else config

    def check(self) -> None:
        """Raise `click.UsageError` for options that contradict each other."""
        if self.instant + self.thorough + (self.iterations is not None) > 1:
            raise click.UsageError("give one of --instant, --thorough and --iterations")
        if self.thorough and self.recipe == "paper":
            raise click.UsageError("--thorough is for the recipe of the base; with --recipe paper, give --iterations")


@click.command()
@click.argument("references", nargs=-1, required=True, metavar="REFS...")
@click.option("--identity", "name", required=True, help="Name of the person, and of the identity file.")
@click.option("--base", default="portrait", show_default=True, help="Base to learn on: portrait, or a base directory.")
@click.option(
    "--method",
    type=click.Choice(["pfstorer", "vico", "dreambooth"]),
    default="pfstorer",
    show_default=True,
    help="Method of personalization; vico and dreambooth are for comparison.",
)
@click.option(
    "--instant",
    is_flag=True,
    help="Learn without training, in seconds. Needs a base that can do this; portrait cannot.",
)
@click.option("--thorough", is_flag=True, help="Train longer, for more likeness: portrait 440 iterations.")
@click.option(
    "--recipe",
    type=click.Choice(["base", "paper"]),
    default="base",
    show_default=True,
    help="Defaults of the training: the base's, or those of the PFStorer paper.",
)
@click.option(
    "--iterations", type=click.IntRange(1), help="Number of training iterations. [default: the base's; portrait: 110]"
)
@click.option("--batch", type=click.IntRange(1), help="Samples per iteration. [default: the base's, else 4]")
@click.option(
    "--learning-rate",
    type=Number(),
    help="Learning rate of the personalization blocks. [default: the base's, else 5e-5]",
)
@click.option(
    "--lambda-gen",
    type=Number(0),
    help="Weight of the loss L_gen of the paper. [default: the base's, else 0.1]",
)
@click.option(
    "--first-step",
    type=Number(0, 1),
    help="Share of samples at timestep 999, where restoring starts. [default: the base's, else 0]",
)
@click.option(
    "--lambda-pixel",
    type=Number(0),
    help="Weight of the pixel error of decoded images. [default: the base's, else 0]",
)
@click.option(
    "--lambda-color",
    type=Number(0),
    help="Weight of the colour loss of decoded images. [default: the base's, else 0]",
)
@click.option(
    "--lambda-perceptual",
    type=Number(0),
    help="Weight of the ST-LPIPS of decoded images. [default: the base's, else 0]",
)
@click.option(
    "--lambda-id",
    type=Number(0),
    help="Weight of the identity loss of decoded images. [default: the base's, else 0]",
)
@click.option(
    "--lambda-face",
    type=Number(0),
    help="Weight of the distance between the recognizer's features of decoded faces. [default: the base's, else 0]",
)
@click.option(
    "--rank",
    type=click.IntRange(0, 4096),
    default=0,
    show_default=True,
    help="Rank of the matrices of the personalization blocks; a low rank gives a small file. 0: full matrices.",
)
@click.option(
    "--ref-source",
    type=click.Choice(["cached", "self"]),
    default="cached",
    show_default=True,
    help="Source of the reference features when restoring: cached from a photograph, or the input image itself.",
)
@click.option(
    "--framing",
    type=click.Choice(["face", "none"]),
    default="face",
    show_default=True,
    help="How the photographs are cropped. face: around small or off-centre faces; none: at the centre.",
)
@click.option(
    "--keep-all",
    is_flag=True,
    help="Use all photographs, also copies, other people, and photographs without a face or with a blurred face.",
)
@click.option(
    "--contact-sheet",
    type=NewFile(),
    help="Image file to write: shows which photographs are used, how they are cropped, and why others are left out.",
)
@training_options
@click.option(
    "-o",
    "--output",
    type=NewFile(),
    help="Identity file. [default: NAME in the user's data directory]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing identity.")
@click.option(
    "--finish",
    is_flag=True,
    help="Make the identity from the last checkpoint of an interrupted training. Repeat the other options.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(references: tuple[str, ...], name: str, **parameters: Any) -> None:
    """Learn a person from 3-5 photographs (files or folders) on a frozen base.

    Copies, other people, photographs without a face and blurred photographs are left out, with a note for each.

    The identity is biometric data: its file is readable by you alone, and
    `pfstorer-rt identities rm NAME` deletes it. Run the same command again to resume an interrupted training;
    --iterations may differ.

    \b
    Example:
      pfstorer-rt personalize --identity alice photos/alice/*.jpg
    """
    from pfstorer_rt.console import counted, echo, note, stage_bars
    from pfstorer_rt.files import make_folder
    from pfstorer_rt.identity import identities_dir, identity_path, training_files

    options, named = Options(**parameters), identity_path(name)
    options.check()
    if named.parent != identities_dir():
        raise SettingError(
            f"identity name {name!r}: expected a name, not a path; give a file as the output", setting="output"
        )
    target, sheet = options.output or named, options.contact_sheet
    if sheet and sheet.exists() and training_files(target)[0].exists() and not options.overwrite:
        sheet = None  # the interrupted call wrote it
    if target.suffix != ".safetensors":
        raise SettingError(f"{target}: expected a file name that ends with .safetensors", setting="output")
    for file in (target, sheet):
        if file:
            check_new(file, options.overwrite)
    import json

    from pfstorer_rt.base_files import shipped_bases
    from pfstorer_rt.imaging.find import find_images, without_results

    with free_cores_only(), fast_imports():
        from pfstorer_rt.models.base import load_base
        from pfstorer_rt.training.personalize import personalize

    photos = without_results(find_images(references, note), note)
    base = load_base(options.base)
    if options.instant and not base.instant:
        raise click.UsageError(
            f"--instant: base {base.config.name} has no prior for learning without training; leave the option out, or "
            "use `fix` for a short training"
        )
    config = options.config(base.config)
    make_folder(target.parent)
    with stage_bars() as on_progress:
        identity = personalize(name, photos, base, config, target, note, on_progress, options.finish, sheet)
    if options.as_json:
        echo(json.dumps({"identity": name, "file": str(target), "gamma": identity.gamma}))
        return
    photographs = counted(len(identity.references), "photograph")
    echo(f"{name}: learned from {photographs} on base {identity.base_name}, saved as {target}")
    source = shlex.quote(str(options.output or name))
    given = "" if options.base in shipped_bases() else f" --base {shlex.quote(options.base)}"
    echo(f"next: pfstorer-rt export --identity {source}{given} -o {name}.plan")
