"""`pfstorer-rt personalize`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from pfstorer_rt.cli.options import ATTENTION, SEED


@click.command()
@click.argument("references", nargs=-1, required=True, metavar="REFS...")
@click.option("--identity", "name", required=True, help="Name of the person; the file is kept under it.")
@click.option("--base", default="tiny", show_default=True, help="tiny, or a base directory.")
@click.option("--method", type=click.Choice(["pfstorer", "vico", "dreambooth"]), default="pfstorer", show_default=True)
@click.option("--iterations", type=click.IntRange(1), help="500, unless the base says otherwise; tiny says 1000.")
@click.option("--batch", type=click.IntRange(1), help="4, unless the base says otherwise.")
@click.option("--learning-rate", type=float, help="Of the blocks; 5e-5, unless the base says otherwise.")
@click.option("--lambda-gen", type=click.FloatRange(0), help="Weight of L_gen; 0.1, unless the base says otherwise.")
@click.option(
    "--first-step",
    type=click.FloatRange(0, 1),
    help="Share of the samples at timestep 999, where restoring starts; 0, unless the base says otherwise.",
)
@click.option("--lambda-pixel", type=click.FloatRange(0), help="Weight of the decoded pictures' error.")
@click.option("--lambda-perceptual", type=click.FloatRange(0), help="Weight of their ST-LPIPS.")
@click.option(
    "--lambda-id",
    type=click.FloatRange(0),
    help="Weight of an identity loss on them; all three are 0, unless the base says otherwise.",
)
@click.option("--rank", type=click.IntRange(0), default=0, help="Rank of the blocks' matrices; 0 keeps them whole.")
@click.option("--ref-source", type=click.Choice(["cached", "self"]), default="cached", show_default=True)
@click.option(
    "--framing",
    type=click.Choice(["face", "none"]),
    default="face",
    show_default=True,
    help="Cut photographs in which the face is small or aside to it; `none` learns their middle.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda.")
@click.option(
    "--attention",
    type=ATTENTION,
    default="auto",
    show_default=True,
    help="What computes attention, gates and norms; triton needs an NVIDIA GPU.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations twice: less memory, more time.")
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adamw8bit", "paged_adamw8bit"]),
    default="adamw",
    show_default=True,
    help="The 8-bit ones need bitsandbytes.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File, in place of the named one.")
@click.option("--overwrite", is_flag=True, help="Replace an identity of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(references: tuple[str, ...], name: str, **options: Any) -> None:
    """Learn a person from 3-5 photographs (files or folders) on a frozen base.

    The identity is biometric data: its file is readable by you alone, and
    `pfstorer-rt identities rm NAME` deletes it. An interrupted run goes on with the same command.

    \b
    Example:
      pfstorer-rt personalize --identity alice photos/alice/*.jpg
    """
    from pfstorer_rt.config import PersonalizeConfig
    from pfstorer_rt.console import stage_bars
    from pfstorer_rt.errors import PFStorerError
    from pfstorer_rt.files import make_folder
    from pfstorer_rt.identity import identities_dir, identity_path

    named = identity_path(name)
    if named.parent != identities_dir():
        raise ValueError(f"identity name {name!r}: expected a name, not a path; give a file with -o")
    target = options["output"] or named
    if target.exists() and not options["overwrite"]:
        raise PFStorerError(f"{target}: exists already; choose another name or pass --overwrite")
    import json

    from pfstorer_rt.imaging.find import find_images
    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.training.personalize import personalize

    photos = find_images([Path(r) for r in references])
    if len(photos) < 3:
        click.echo(f"note: {len(photos)} photograph(s); 3-5 give a better likeness", err=True)
    base = load_base(options["base"])
    names = (
        "iterations",
        "batch",
        "learning_rate",
        "precision",
        "device",
        "seed",
        "optimizer",
        "gradient_checkpointing",
        "attention",
    )
    losses = ("lambda_gen", "lambda_pixel", "lambda_perceptual", "lambda_id")
    own = ("method", *losses, "first_step", "rank", "ref_source", "framing")
    train, values = ({n: options[n] for n in group if options[n] is not None} for group in (names, own))
    config = PersonalizeConfig.for_base(base.config, train, **values)
    make_folder(target.parent)
    with stage_bars() as on_progress:
        identity = personalize(
            name, photos, base, config, target, lambda line: click.echo(f"note: {line}", err=True), on_progress
        )
    if options["as_json"]:
        click.echo(json.dumps({"identity": name, "file": str(target), "gamma": identity.gamma}))
        return
    click.echo(f"{name}: learned from {len(photos)} photographs on base {identity.base_name}, kept in {target}")
    source = shlex.quote(str(options["output"] or name))
    click.echo(f"next: pfstorer-rt export --identity {source} -o {name}.plan")
