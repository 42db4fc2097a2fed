"""Types of options that several commands share."""

from typing import get_args

import click

from pfstorer_rt.config import Attention

ATTENTION = click.Choice(get_args(Attention))
SEED = click.IntRange(0, 2**32 - 1)
"""What NumPy takes as a seed, and PyTorch too when it is multiplied by a count."""
