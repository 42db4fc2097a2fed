"""The errors that this package raises: one family, so that a caller can catch all of them at once.

A message says what was got, what was expected, and what to do.
"""

from __future__ import annotations


class PFStorerError(Exception):
    """Anything that the caller can put right; the command line prints it as one line."""


class BadFileError(PFStorerError):
    """A file that is missing, damaged, of the wrong kind, or from a newer version."""


class MismatchError(PFStorerError):
    """Two artefacts that do not belong together, such as an identity and another base."""


class MissingBackendError(PFStorerError):
    """A backend or optional package that this machine does not have; the message says what to install."""


class ParityError(PFStorerError):
    """An exported component that does not compute what its PyTorch original computes."""
