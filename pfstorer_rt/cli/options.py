"""Option types that several commands share, and the flag of every setting."""

from typing import get_args

import click

from pfstorer_rt.config import Attention
from pfstorer_rt.errors import one_line

ATTENTION = click.Choice(get_args(Attention))
SEED = click.IntRange(0, 2**32 - 1)
"""The range of NumPy's seeds; PyTorch accepts these seeds multiplied by a count too."""
FLAGS = {"output": "-o", "trust": "--trust-plan", "extension": "--format", "references": "--refs", "mode": "--tiling"}
"""Setting of the library -> flag, where the flag is not the setting's own name."""


def flag(setting: str) -> str:
    """Return the flag that sets a setting of the library."""
    return FLAGS.get(setting, "--" + setting.replace("_", "-"))


def explain(error: BaseException) -> str:
    """Return an error's message on one line, with the flag of the setting at fault."""
    setting = getattr(error, "setting", None)
    return f"{one_line(error)} ({flag(setting)})" if setting else one_line(error)
