"""Option types that several commands share, the flag of every setting, and the command of every export."""

import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from pfstorer_rt.config import Attention, Optimizer, Precision
from pfstorer_rt.console import note
from pfstorer_rt.errors import Rebuild, SettingError, one_line

REMOVE_SCRATCHES = "First remove scratches, dust and creases of a printed photograph."
"""Help of `--remove-scratches`."""


class NewFile(click.Path):
    """A file to write; `click.Path` drops a slash at the end, which marks a folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; fails for an empty name and for a folder."""
        if not os.fspath(value) or os.fspath(value).endswith(("/", os.sep)):
            self.fail(f"{str(value)!r} is not a file; give a file name.", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A finite number in a range; `click.FloatRange` accepts NaN."""

    def _describe_range(self) -> str:
        """Return the range for the help; click writes `x<=None` for a number without bounds."""
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a number; fails for NaN and infinities."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def parse_place(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    """Parse a value of `runtime.selection.ApplyTo`: a word, or a rectangle X,Y,W,H in pixels."""
    if value in ("matching", "all", "largest"):
        return value
    from pfstorer_rt.runtime.selection import Area

    numbers = [int(text) for text in value.split(",") if re.fullmatch(r" *[0-9]{1,9} *", text)]
    if len(numbers) != 4 or value.count(",") != 3 or 0 in numbers[2:]:
        expected = "expected matching, all, largest, or four whole numbers X,Y,W,H with a width and a height above 0"
        raise click.BadParameter(f"{value[:80]!r}: {expected}", ctx, param)
    return Area(*numbers)


def check_plan(name: str) -> None:
    """Raise `click.UsageError` for an identity or a base in place of a plan, with the command that was meant."""
    from pfstorer_rt.base_files import shipped_bases
    from pfstorer_rt.files import is_name
    from pfstorer_rt.identity import named_identity

    file, given = Path(name), shlex.quote(name)
    if not name:
        raise click.UsageError("the name of the plan is empty; give a plan file")
    if file.is_file() and file.suffix != ".safetensors":
        return
    if Path(f"{name}.plan").is_file():
        raise click.UsageError(f"{name}: no such plan; did you mean {name}.plan?")
    if file.is_file() or (is_name(name) and file.suffix != ".safetensors" and named_identity(name).is_file()):
        raise click.UsageError(
            f"{name}: an identity, expected a plan; to export it: `pfstorer-rt export --identity {given} -o "
            f"{shlex.quote(file.stem + '.plan')}`; to restore without a plan: --base portrait --identity {given}"
        )
    if name in shipped_bases() and not file.exists():
        raise click.UsageError(
            f"{name}: a base, expected a plan; to export it: `pfstorer-rt export --base {name} -o {name}.plan`; to "
            f"restore without a plan: --base {name}"
        )


def check_new(file: Path, overwrite: bool) -> None:
    """Raise `SettingError` if a file to write is a folder, or exists and may not be replaced."""
    from pfstorer_rt.files import exists_already

    if file.is_dir():
        raise SettingError(f"{file}: a folder; choose a file name")
    if file.exists() and not overwrite:
        raise SettingError(str(exists_already(file)), setting="overwrite")


def check_output(file: Path, overwrite: bool) -> None:
    """Raise `SettingError` before long work if a file cannot be written: as `check_new`, and for its folder.

    A missing folder can be made if the nearest existing folder above it is writable.
    """
    from pfstorer_rt.files import real_path

    check_new(file, overwrite)
    folder = real_path(file).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise SettingError(f"{file}: {folder} is a file; expected a folder: choose another one")
    if not os.access(folder, os.W_OK):
        raise SettingError(f"{file}: cannot be written (permission denied); choose another folder")


ATTENTION = click.Choice(get_args(Attention))
SEED = click.IntRange(0, 2**32 - 1)
"""The range of NumPy's seeds; PyTorch accepts these seeds multiplied by a count too."""
Command = TypeVar("Command", bound=Callable[..., Any])
TRAINING = ("seed", "precision", "device", "attention", "gradient_checkpointing", "optimizer")
"""Parameters of `training_options`, which are fields of `TrainConfig`."""
FLAGS = {
    "compute_capabilities": "--compute-capability",
    "extension": "--format",
    "mode": "--tiling",
    "output": "-o",
    "references": "--refs",
    "trust": "--trust-plan",
}
"""Setting of the library -> flag, where the flag is not the setting's own name."""


def training_options(command: Command) -> Command:
    """Add the options that every training has: how it computes, not what."""
    options = (
        click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed."),
        click.option(
            "--precision",
            type=click.Choice(get_args(Precision)),
            default="auto",
            show_default=True,
            help="Precision of the training; auto: bf16 where the device computes it natively, else fp32.",
        ),
        click.option("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:N."),
        click.option(
            "--attention",
            type=ATTENTION,
            default="auto",
            show_default=True,
            help="Kernels for attention, gates and norms; triton needs an NVIDIA GPU.",
        ),
        click.option(
            "--gradient-checkpointing",
            is_flag=True,
            help="Recompute activations in the backward pass: less memory, more time.",
        ),
        click.option(
            "--optimizer",
            type=click.Choice(get_args(Optimizer)),
            help="Optimizer; the 8-bit ones need bitsandbytes. [default: in personalize the base's, else adamw]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_stdout(inputs: Sequence[str], output: str | None) -> None:
    """Raise `click.UsageError` if a result would be written to a terminal."""
    to_stdout = output == "-" or (output is None and "-" in inputs)
    if to_stdout and sys.stdout is not None and sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal; write `> result.png`, or name a file with -o")


def note_weight(weight: float | None) -> None:
    """Print a note about a weight of the feature wrapping outside its range."""
    if weight is not None and not 0 <= weight <= 1:
        note(f"--cfw-weight {weight:g}: expected 0 to 1; other values give false colours")


def note_strength(strength: float) -> None:
    """Print a note about a strength far from the trained one."""
    from pfstorer_rt.runtime.recipe import LARGEST_WEIGHT

    if not -1 <= strength <= 2 and abs(strength) <= LARGEST_WEIGHT:  # a larger one is refused
        note(f"--strength {strength:g}: identities are trained at 1; values outside -1 ... 2 distort the face")


def flag(setting: str) -> str:
    """Return the flag that sets a setting of the library."""
    return FLAGS.get(setting, "--" + setting.replace("_", "-"))


def explain(error: BaseException, command: click.Command | None = None) -> str:
    """Return an error's message on one line, with the flag of the setting at fault and the command that helps.

    command: the command that failed; a flag that it does not have is left out.
    """
    setting, rebuild = getattr(error, "setting", None), getattr(error, "rebuild", None)
    offered = command is None or any(setting and flag(setting) in option.opts for option in command.params)
    hint = f" ({flag(setting)})" if setting and offered else ""
    return one_line(error) + hint + (f"; to export it: `{export_command(rebuild)}`" if rebuild else "")


def export_command(rebuild: Rebuild) -> str:
    """Return the command of an export; `DIR` stands for the folder of an imported base."""
    words = ["pfstorer-rt", "export"]
    words += ["--identity", rebuild.identity] if rebuild.identity else []
    if not rebuild.identity or rebuild.base is None:
        words += ["--base", rebuild.base or "DIR"]
    words += ["--target", rebuild.target, "--precision", rebuild.precision]
    for name in rebuild.compute_capabilities:
        words += ["--compute-capability", name]
    return shlex.join([*words, "-o", rebuild.file, "--overwrite"])
