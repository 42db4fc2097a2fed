"""`pfstorer-rt fix`."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import click

from pfstorer_rt.cli.imports import fast_imports
from pfstorer_rt.cli.options import REMOVE_SCRATCHES, Number, check_stdout, note_strength
from pfstorer_rt.cli.threads import free_cores_only
from pfstorer_rt.files import is_name
from pfstorer_rt.identity import named_identity


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUTS...")
@click.option(
    "--person",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of good photographs of the person.",
)
@click.option("-o", "--output", help="File for one image, folder for several. [default: beside the input]")
@click.option("--base", default="portrait", show_default=True, help="Base: portrait, or a base directory.")
@click.option(
    "--strength", type=Number(), default=1.0, show_default=True, help="Strength of the identity: 0 is the base alone."
)
@click.option("--remove-scratches", is_flag=True, help=REMOVE_SCRATCHES)
@click.option("--overwrite", is_flag=True, help="Replace existing results.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
def command(
    inputs: tuple[str, ...],
    person: Path,
    output: str | None,
    base: str,
    strength: float,
    remove_scratches: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Restore images of a person in one command, and write {result}_compare: input and result side by side.

    An identity that `personalize` made from the same photographs is used. Without one, the person is learned for a
    short time, and the identity is not stored. This needs a base with a prior for a short training, such as portrait.

    \b
    Example:
      pfstorer-rt fix old.jpg --person photos/alice/
    """
    check_person(person, base)
    check_stdout(inputs, output)
    from pfstorer_rt.cli.outcomes import conclude, show
    from pfstorer_rt.cli.progress import batch_bars
    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.console import note, stage_bars
    from pfstorer_rt.fix import FixConfig, find_work, restorer_for
    from pfstorer_rt.runtime.batch import BatchConfig, Saving, engine_notes, restore_jobs

    note_strength(strength)
    config = RestoreConfig(strength=strength, remove_scratches=remove_scratches)
    batch = BatchConfig(config, saving=Saving(overwrite), compare=True)
    report = partial(show, as_json=as_json, command=click.get_current_context().command)
    jobs, outcomes = find_work(inputs, output, batch, report, note)
    if not outcomes:
        with free_cores_only(), fast_imports():
            import_module("pfstorer_rt.models.base")  # `restorer_for` would import it more slowly
        with stage_bars() as on_progress:
            restorer = restorer_for(person, FixConfig(base, batch), note, on_progress)
        with restorer:
            for text in engine_notes(restorer, batch):
                note(text)
            with batch_bars("restore", len(jobs)) as progress:
                outcomes = restore_jobs(restorer, jobs, batch, report, progress)
    sys.exit(conclude(outcomes, as_json))


def check_person(person: Path, base: str) -> None:
    """Raise `click.UsageError` unless a path is a folder; for an identity, with the command that was meant."""
    if person.is_dir():
        return
    name = str(person)
    if is_name(name) and not name.endswith(".safetensors") and named_identity(name).is_file():
        call = f"pfstorer-rt restore --base {shlex.quote(base)} --identity {person} INPUTS"
        raise click.UsageError(f"--person {person}: an identity, expected a folder of photographs; use `{call}`")
    raise click.UsageError(f"--person {person}: no such folder; expected a folder of photographs of the person")
