"""Pictures of several methods, paired by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """Pictures of several methods, by name."""

    results: Mapping[str, Mapping[str, Path]]
    """Method -> name of a picture -> file."""

    @property
    def names(self) -> list[str]:
        """Names of the pictures that every method has."""
        return sorted(set.intersection(*(set(own) for own in self.results.values())))
