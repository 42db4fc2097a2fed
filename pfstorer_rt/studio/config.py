"""Settings of the studio."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from pfstorer_rt.errors import SettingError
from pfstorer_rt.plan import DEFAULT_BASE

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHORTEST_TOKEN = 8


@dataclass(frozen=True)
class Limits:
    """Limits on what a page may send."""

    file_bytes: int = 64 << 20
    """Largest file."""
    files: int = 200
    """Largest number of pictures in one call."""
    pixels: int = 50_000_000
    """Largest picture, and largest result."""
    total_bytes: int = 4 << 30
    """Largest size of all files that the studio holds at once."""


@dataclass(frozen=True)
class StudioConfig:
    """Settings of the studio."""

    base: str | Path = DEFAULT_BASE
    """Name of a shipped base, or a base directory."""
    plans: tuple[Path, ...] = ()
    """Plans that the page offers beside the stored identities."""
    host: str = "127.0.0.1"
    port: int = 7860
    """Port; 0 selects a free one."""
    token: str | None = None
    """Password of the page; required for a host that other machines can reach."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Raise `SettingError` for a host that other machines can reach without a token, and for an unusable token."""
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise SettingError(f"a token of {len(self.token)} characters: expected {SHORTEST_TOKEN} or more")
        if self.token is not None and not is_text(self.token):
            raise SettingError("a token with bytes that are not UTF-8: expected text; choose another token")
        if self.token is None and not is_loopback(self.host):
            raise SettingError(
                f"host {self.host}: other machines can reach this address; expected a token too, which every visitor "
                "must enter"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_text(token: str) -> bool:
    """Whether a token is Unicode text; Python keeps bytes of the shell that are not as lone surrogates."""
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True
