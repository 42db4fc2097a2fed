"""Types of options that several commands share."""

import click

SEED = click.IntRange(0, 2**32 - 1)
"""What NumPy takes as a seed, and PyTorch too when it is multiplied by a count."""
