"""The errors that this package raises: one family, so that a caller can catch all of them at once.

A message states what was found, what was expected, and what to do.
"""

from __future__ import annotations

_LONGEST = 200  # characters of another library's message that are shown


class PFStorerError(Exception):
    """An error that the caller can correct; the command line prints it as one line."""

    def __init__(self, *arguments: object, setting: str | None = None) -> None:
        """Keep the message, and the name of the setting at fault (`overwrite`, `backend`, ...) where there is one."""
        super().__init__(*arguments)
        self.setting = setting


class SettingError(PFStorerError, ValueError):
    """A setting or an argument that the caller must change; also a `ValueError`."""


class BadFileError(PFStorerError):
    """A file that is missing, damaged, of the wrong kind, or from a newer version."""


class MismatchError(PFStorerError):
    """Two artefacts that do not belong together, such as an identity and another base."""


class MissingBackendError(PFStorerError):
    """A backend or optional package that this machine does not have; the message names what to install."""


class ParityError(PFStorerError):
    """An exported component whose results differ from those of its PyTorch original."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its type's name where it has none.

    Messages of other libraries are cut after 200 characters; those of this package are complete.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, PFStorerError) else text[:_LONGEST]
