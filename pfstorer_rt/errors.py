"""The errors that this package raises: one family, so that a caller can catch all of them at once.

A message states what was found, what was expected, and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST = 200  # characters of another library's message that are shown


@dataclass(frozen=True)
class Rebuild:
    """The export that makes a plan usable on this machine."""

    identity: str | None
    """Name of the identity; None for a plan without one."""
    base: str | None
    """Name of a shipped base; None for an imported base, whose folder a plan does not record."""
    target: str
    precision: str
    compute_capabilities: tuple[str, ...]
    """GPUs to build for; empty selects the target's default."""
    file: str
    """Name of the plan file."""


class PFStorerError(Exception):
    """An error that the caller can correct; the command line prints it as one line.

    setting: name of the setting at fault (`overwrite`, `backend`, ...). rebuild: the export that replaces the plan at
    fault. Both are None where they do not apply. The command line shows them as an option and as a command.
    """

    def __init__(self, *arguments: object, setting: str | None = None, rebuild: Rebuild | None = None) -> None:
        super().__init__(*arguments)
        self.setting, self.rebuild = setting, rebuild


class SettingError(PFStorerError, ValueError):
    """A setting or an argument that the caller must change; also a `ValueError`."""


class BadFileError(PFStorerError):
    """A file that is missing, damaged, of the wrong kind, or from a newer version."""


class ExistsError(PFStorerError):
    """An output file that exists already and may not be replaced."""


class MismatchError(PFStorerError):
    """Two files that do not belong together, such as an identity and another base."""


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
