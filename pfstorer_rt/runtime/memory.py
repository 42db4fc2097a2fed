"""Smaller tiles of the encoder and decoder where the memory is too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pfstorer_rt.engine.session import out_of_memory
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.runtime.layout import CodecTiles

T = TypeVar("T")


def run_codec(tiles: CodecTiles, compute: Callable[[CodecTiles], T]) -> tuple[T, CodecTiles]:
    """Return `compute(tiles)` and the tiles; after each out-of-memory error, the side of the tiles is halved.

    Raises `PFStorerError` when the smallest tiles need too much memory.
    """
    while True:
        try:
            return compute(tiles), tiles
        except Exception as error:  # every engine has its own error types
            if not out_of_memory(error):
                raise
            smaller = tiles.halved()
            if smaller is None:
                raise PFStorerError(
                    "too little memory for the smallest tile of encoder and decoder; close other programs, or use a "
                    "smaller scale"
                ) from error
        tiles = smaller  # outside of `except`, so that the error and its tensors are freed first
