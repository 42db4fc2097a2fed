"""The progress of an export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Phase = Callable[[str, int, int], None]
"""phase(name, finished steps, all steps), within a stage."""


def ignore(_: str, __: int, ___: int) -> None:
    """A `Phase` that shows nothing."""


@dataclass(frozen=True)
class Progress:
    """Callbacks of an export."""

    line: Callable[[str], None] = lambda _: None
    """line(text), at each stage."""
    phase: Phase = ignore
    """phase(name, finished steps, all steps), within a stage."""


def each(items: Iterable[Item], name: str, phase: Phase, total: int = 0) -> Iterator[Item]:
    """Yield items and report their number as the finished steps of a phase.

    total: the number of items, where `items` has no length.
    """
    total = len(items) if isinstance(items, Sized) else total
    phase(name, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        phase(name, done, total)
