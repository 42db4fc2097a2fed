"""Faster imports of large packages."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import without garbage collections, and exclude what is imported from later ones.

    diffusers imports bitsandbytes where it is installed, which takes 2 seconds. Only 8-bit optimizers need it; they
    import it themselves.
    """
    hidden = sys.modules.setdefault("bitsandbytes", None) is None  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind prints every object that is left at the end
        if hidden:
            sys.modules.pop("bitsandbytes", None)
