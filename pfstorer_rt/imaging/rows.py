"""Images by rows: small images are stored in memory, large images in a temporary file.

Processing by rows needs memory for one band. A band is a (C, n, W) float32 array in [-1, 1], the range of the networks.
Image files and public functions use (H, W, C) pixels in [0, 1].
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import system_folder

Array = npt.NDArray[Any]
Band = npt.NDArray[np.float32]
"""(C, n, W) in [-1, 1]: n rows of an image."""
Pixels = npt.NDArray[np.float32]
"""(H, W, C) in [0, 1]."""

IN_MEMORY = 64 << 20
"""Largest image in bytes that is stored in memory."""
BAND_BYTES = 4 << 20
"""Default size of a band in bytes."""
OVERSHOOT = 0.25
"""How far the values of an image may lie outside [0, 1]: bicubic resizing overshoots by less."""
TALL = 128
"""Minimum rows of a band for operations that need a margin around each band, such as the wavelet colour fix."""
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Bands that are computed at once. NumPy releases Python's lock, so threads share the work."""

Read = TypeVar("Read")


class Rows(Protocol):
    """An image that is read by rows."""

    height: int
    width: int

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1: (C, stop - start, width) float32 in [-1, 1]."""
        ...


class Spool:
    """A (C, H, W) image that is written first and read later: float32 in [-1, 1], or uint8 levels of this range.

    in_memory: largest size in bytes that is stored in memory; a larger image is stored in a temporary file (in TMPDIR),
    which is deleted with the object. Several threads may read at once.
    """

    def __init__(
        self, height: int, width: int, channels: int = 3, dtype: Any = np.float32, in_memory: int = IN_MEMORY
    ) -> None:
        """Raise `PFStorerError` if a temporary file is needed and cannot be created."""
        self.height, self.width, self.channels, self.dtype = height, width, channels, np.dtype(dtype)
        self._row = width * channels * self.dtype.itemsize
        self._array: Array | None = None
        self._file: Any = None
        self._lock = threading.Lock()  # the file has one position
        if height * self._row <= in_memory:
            self._array = np.zeros((channels, height, width), self.dtype)
            return
        try:
            self._file = tempfile.TemporaryFile(prefix="pfstorer-", dir=system_folder())  # noqa: SIM115
        except OSError as error:
            raise _disk_error(error) from error
        weakref.finalize(self, self._file.close)

    @classmethod
    def of(cls, array: Array) -> Spool:
        """Wrap a (C, H, W) array without a copy."""
        made = cls(0, array.shape[2], array.shape[0], array.dtype)
        made.height, made._array = array.shape[1], array
        return made

    def write(self, start: int, band: Array) -> None:
        """Store a (C, n, W) band at row `start`; raises `PFStorerError` if the disk is full."""
        if self._array is not None:
            self._array[:, start : start + band.shape[1]] = band
            return
        try:
            self._file.seek(start * self._row)
            self._file.write(np.ascontiguousarray(band.swapaxes(0, 1), self.dtype).data)  # stored row by row
        except OSError as error:
            raise _disk_error(error) from error

    def write_columns(self, start: int, columns: Array) -> None:
        """Store (C, H, n) at column `start`; raises `PFStorerError` if the disk is full."""
        if self._array is not None:
            self._array[:, :, start : start + columns.shape[2]] = columns
            return
        columns = np.ascontiguousarray(columns, self.dtype)
        try:
            for y in range(self.height):
                for channel in range(self.channels):
                    self._file.seek(y * self._row + (channel * self.width + start) * self.dtype.itemsize)
                    self._file.write(columns[channel, y].data)
        except OSError as error:
            raise _disk_error(error) from error

    def read(self, start: int, stop: int) -> Band:
        """Return a copy of rows start..stop-1, (C, n, W) float32 in [-1, 1]."""
        band = self._unit(start, stop)
        return band * 2 - 1 if self.dtype == np.uint8 else band

    def pixels(self, start: int, stop: int) -> Pixels:
        """Return rows start..stop-1 as (n, W, C) in [0, 1]; uint8 levels are divided by 255."""
        band = self._unit(start, stop)
        return np.ascontiguousarray(band.transpose(1, 2, 0)) if self.dtype == np.uint8 else to_pixels(band)

    def _unit(self, start: int, stop: int) -> Band:
        """Return rows as float32: uint8 levels in [0, 1], floats unchanged."""
        band = np.array(self._stored(start, stop), np.float32, order="C")
        return band / np.float32(255) if self.dtype == np.uint8 else band

    def _stored(self, start: int, stop: int) -> Array:
        if self._array is not None:
            return self._array[:, start:stop]
        rows = np.empty((stop - start, self.channels, self.width), self.dtype)
        try:
            with self._lock:
                self._file.seek(start * self._row)
                self._file.readinto(rows.data.cast("B"))
        except OSError as error:
            raise _disk_error(error) from error
        return rows.swapaxes(0, 1)


def spooled_bytes(height: int, width: int) -> int:
    """Return the size of the temporary file of a colour image of float32: 0 for one that is stored in memory."""
    size = 3 * 4 * height * width
    return size if size > IN_MEMORY else 0


def check_temporary_space(needed: int) -> None:
    """Raise `PFStorerError` if the folder of temporary files has less than `needed` bytes free."""
    if not needed:
        return
    try:
        folder = system_folder()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _disk_error(error) from error
    if free < needed:
        raise PFStorerError(
            f"the temporary files of this image need {math.ceil(needed / 1e6)} MB, and {folder} has "
            f"{free // 10**6} MB free; free some space or set TMPDIR to another folder"
        )


def check_pixels(pixels: Any) -> None:
    """Raise `ValueError` unless an array is an image (H, W, 3) of floats in [0, 1].

    Values that exceed this range by at most `OVERSHOOT` are accepted.
    """
    if not isinstance(pixels, np.ndarray):
        raise ValueError(f"pixels of type {type(pixels).__name__}; expected a NumPy array (H, W, 3)")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"pixels of shape {pixels.shape}; expected (H, W, 3): an RGB image")
    if pixels.dtype.kind != "f":
        raise ValueError(f"pixels of type {pixels.dtype}; expected float32 in [0, 1]: divide levels by 255")
    low, high = float(pixels.min()), float(pixels.max())  # NaN if any value is NaN
    if not -OVERSHOOT <= low <= high <= 1 + OVERSHOOT:
        raise ValueError(f"pixels from {low:g} to {high:g}; expected 0 to 1: rescale or clamp them")


def from_pixels(pixels: Pixels) -> Band:
    """Convert (n, W, C) in [0, 1] to a band (C, n, W) in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) * 2 - 1


def to_pixels(band: Band) -> Pixels:
    """Convert a band (C, n, W) in [-1, 1] to (n, W, C), clamped to [0, 1]; NaN stays NaN."""
    return np.ascontiguousarray(((band + 1) / 2).clip(0, 1).transpose(1, 2, 0))


def read_pixels(rows: Rows, start: int, stop: int) -> Pixels:
    """Read rows start..stop-1 of an image as (n, W, C) in [0, 1]."""
    return rows.pixels(start, stop) if isinstance(rows, Spool) else to_pixels(rows.read(start, stop))


def bands(height: int, width: int, bytes_per_pixel: int = 12, least: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of bands of about `BAND_BYTES` each. Every band but the last has at least `least` rows."""
    rows = max(least, BAND_BYTES // max(1, width * bytes_per_pixel), 1)
    for start in range(0, height, rows):
        yield start, min(height, start + rows)


def read_ahead(
    read: Callable[[int, int], Read], spans: Iterable[tuple[int, int]], threads: int = THREADS
) -> Iterator[Read]:
    """Yield `read(start, stop)` of every span in order; threads compute the next ones meanwhile, one each."""
    pool, waiting = ThreadPoolExecutor(threads), deque[Future[Read]]()
    try:
        for span in spans:
            waiting.append(pool.submit(read, *span))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # without waiting: Python ignores a Ctrl-C that comes while it frees an unfinished generator
        pool.shutdown(wait=False, cancel_futures=True)


def read_whole(rows: Rows) -> Band:
    """Return all rows of an image, (C, H, W) in [-1, 1]; several threads compute them."""
    return np.concatenate(list(read_ahead(rows.read, bands(rows.height, rows.width, least=TALL))), 1)


def _disk_error(error: OSError) -> PFStorerError:
    reason = (error.strerror or str(error)).lower()
    return PFStorerError(
        f"the temporary file of a large image in {tempfile.gettempdir()} failed ({reason}); free some space or set "
        "TMPDIR to another folder"
    )


def resize_alpha(alpha: Rows, height: int, width: int) -> Rows | Pixels:
    """Resize rows of one channel to the size of a result: rows, or (H, W) pixels in [0, 1]."""
    from PIL import Image

    if (alpha.height, alpha.width) == (height, width):
        return alpha
    whole = Image.fromarray(read_pixels(alpha, 0, alpha.height)[..., 0], "F")
    return np.clip(np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC), np.float32), 0, 1)
