"""The number of torch's threads beside an engine that has its own threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()


@contextmanager
def one_host_thread(wanted: bool) -> Iterator[None]:
    """Limit torch to one thread for operations of the calling thread; other threads keep their number.

    torch's threads spin for a while after each operation and take processor time from the engine's threads. Beside an
    engine, torch has little work.
    """
    if not wanted:
        yield
        return
    with _lock:  # otherwise a thread could read a number that another thread is changing
        before = torch.get_num_threads()
        _set_here(1, before)
    try:
        yield
    finally:
        with _lock:
            _set_here(before, before)


def _set_here(number: int, default: int) -> None:
    """Set the number of threads for the calling thread.

    torch also makes this number the default of later threads; a separate thread restores that default.
    """
    torch.set_num_threads(number)
    if number != default:
        setter = threading.Thread(target=torch.set_num_threads, args=(default,))
        setter.start()
        setter.join()
