"""Images turned by quarter turns, for scans and photographs whose orientation is not recorded."""

from __future__ import annotations

import numpy as np

from pfstorer_rt.imaging.rows import Band, Rows, Spool, bands


class UpsideDown:
    """An image turned by 180 degrees."""

    def __init__(self, source: Rows) -> None:
        self.source, self.height, self.width = source, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        return np.ascontiguousarray(self.source.read(self.height - stop, self.height - start)[:, ::-1, ::-1])


def turned(source: Rows, turns: int) -> Rows:
    """Return an image turned clockwise by a number of quarter turns.

    An odd number of turns reads and copies the whole image immediately: its rows become columns. Raises `PFStorerError`
    if the temporary file of a large image cannot be written.
    """
    turns %= 4
    if turns % 2 == 0:
        return UpsideDown(source) if turns else source
    made = Spool(source.width, source.height)
    for start, stop in bands(source.height, source.width):
        columns = np.rot90(source.read(start, stop), -turns, axes=(1, 2))
        made.write_columns(source.height - stop if turns == 1 else start, columns)
    return made
