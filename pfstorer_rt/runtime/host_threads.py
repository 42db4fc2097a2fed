"""The number of threads that torch uses beside an engine with threads of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()


@contextmanager
def one_host_thread(wanted: bool) -> Iterator[None]:
    """Let torch use one thread for the operations of the calling thread; other threads keep their number.

    Threads of torch spin for a while after each operation and take the processor from the threads of an engine. Beside
    an engine torch has little to do.
    """
    if not wanted:
        yield
        return
    with _lock:  # a thread that enters reads its own number, not one that another thread is changing
        before = torch.get_num_threads()
        _set_here(1, before)
    try:
        yield
    finally:
        with _lock:
            _set_here(before, before)


def _set_here(number: int, default: int) -> None:
    """Set the number of the calling thread.

    torch also makes it the default of threads that start later; another thread sets that default back.
    """
    torch.set_num_threads(number)
    if number != default:
        setter = threading.Thread(target=torch.set_num_threads, args=(default,))
        setter.start()
        setter.join()
