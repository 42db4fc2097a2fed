"""Pictures by rows: in memory while they are small, in a temporary file once they are large.

What works on rows alone needs memory for a band of a picture, not for the picture. A file that is read and written
is not part of a process's memory, as a mapped one would be; the system caches it as far as it has room.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pfstorer_rt.errors import PFStorerError

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.float32]

IN_MEMORY = 64 << 20
"""Bytes up to which a picture is kept in memory."""
BAND_BYTES = 4 << 20
"""About the bytes of a band when nothing else says how many rows to take at once."""
TALL = 128
"""Rows of a band at least where each comes at the price of a margin, as in the wavelet's colour fix."""


class Rows(Protocol):
    """A picture that is asked for by rows."""

    height: int
    width: int

    def read(self, start: int, stop: int) -> Pixels:
        """Return rows start..stop-1: (stop - start, width, channels) float32."""
        ...


class Spool:
    """(H, W, C) rows that were written to be read; floats, or bytes that stand for 0 to 1.

    A temporary file (in TMPDIR) lives as long as the object. For one thread at a time.
    """

    def __init__(self, height: int, width: int, channels: int = 3, dtype: Any = np.float32) -> None:
        """Raise `PFStorerError` where a temporary file is needed and cannot be made."""
        self.height, self.width, self.channels, self.dtype = height, width, channels, np.dtype(dtype)
        self._row = width * channels * self.dtype.itemsize
        self._array: Array | None = None
        self._file: Any = None
        if height * self._row <= IN_MEMORY:
            self._array = np.zeros((height, width, channels), self.dtype)
            return
        try:
            self._file = tempfile.TemporaryFile(prefix="pfstorer-")  # noqa: SIM115
        except OSError as error:
            raise _disk_error(error) from error
        weakref.finalize(self, self._file.close)

    @classmethod
    def of(cls, array: Array) -> Spool:
        """Wrap an array (H, W, C) without copying it."""
        made = cls(0, array.shape[1], array.shape[2], array.dtype)
        made.height, made._array = array.shape[0], array
        return made

    def write(self, start: int, rows: Array) -> None:
        """Put rows (n, W, C) from row `start` on; raises `PFStorerError` on a full disk."""
        if self._array is not None:
            self._array[start : start + len(rows)] = rows
            return
        try:
            self._file.seek(start * self._row)
            self._file.write(np.ascontiguousarray(rows, self.dtype).data)
        except OSError as error:
            raise _disk_error(error) from error

    def read(self, start: int, stop: int) -> Pixels:
        """Return rows start..stop-1 as float32; bytes are divided by 255."""
        rows = self.stored(start, stop)
        return rows.astype(np.float32) / np.float32(255) if rows.dtype == np.uint8 else rows.astype(np.float32)

    def stored(self, start: int, stop: int) -> Array:
        """Return rows start..stop-1 as they are kept."""
        if self._array is not None:
            return self._array[start:stop]
        rows = np.empty((stop - start, self.width, self.channels), self.dtype)
        try:
            self._file.seek(start * self._row)
            self._file.readinto(rows.data.cast("B"))
        except OSError as error:
            raise _disk_error(error) from error
        return rows


def bands(height: int, width: int, bytes_per_pixel: int = 12, least: int = 1) -> Iterator[tuple[int, int]]:
    """Cut `height` rows into (start, stop) of about `BAND_BYTES`, at least `least` rows each but the last."""
    rows = max(least, BAND_BYTES // max(1, width * bytes_per_pixel), 1)
    for start in range(0, height, rows):
        yield start, min(height, start + rows)


def _disk_error(error: OSError) -> PFStorerError:
    reason = (error.strerror or str(error)).lower()
    return PFStorerError(
        f"the temporary file of a large picture in {tempfile.gettempdir()} failed ({reason}); free some space or set "
        "TMPDIR to another folder"
    )
