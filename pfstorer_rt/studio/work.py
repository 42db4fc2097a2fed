"""A call of the library in its own thread, with progress, time left and cancellation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pfstorer_rt.progress import CancelledError

Result = TypeVar("Result")
INTERVAL = 0.25
"""Seconds between two states of a running call."""


@dataclass(frozen=True)
class State:
    """How far a call is."""

    text: str
    share: float | None = None
    """Finished share; None where it is unknown."""
    seconds_left: float | None = None
    extra: Any = None
    """Anything else that the page shows, such as a preview."""


Report = Callable[..., None]
"""report(text, share=None, extra=None); raises `CancelledError` once the work is cancelled."""


class Work(Generic[Result]):
    """One call in a thread. Iterate over `states()` to follow it, then read `result()`."""

    def __init__(self, call: Callable[[Report], Result], clock: Callable[[], float] = time.monotonic) -> None:
        self._call, self._clock = call, clock
        self._cancelled, self._changed = threading.Event(), threading.Event()
        self._state, self._started = State("starting"), clock()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the call has not ended yet."""
        return self._thread.is_alive()

    def cancel(self) -> None:
        """Ask the call to stop at its next report."""
        self._cancelled.set()

    def report(self, text: str, share: float | None = None, extra: Any = None) -> None:
        """Set the state; raises `CancelledError` once the work is cancelled.

        The time left is estimated from the time since the last report without a share.
        """
        left = None
        if share is None and extra is None:
            self._started = self._clock()
        if share and share > 0:
            left = (self._clock() - self._started) * (1 - share) / share
        self._state = State(text, share, left, self._state.extra if extra is None else extra)
        self._changed.set()
        if self._cancelled.is_set():
            raise CancelledError("cancelled")

    def states(self, interval: float = INTERVAL) -> Iterator[State]:
        """Yield the state whenever it changes, at most once in `interval` seconds, until the call ends."""
        while self._thread.is_alive():
            if self._changed.wait(interval):
                self._changed.clear()
                yield self._state
                self._thread.join(interval)

    def result(self) -> Result:
        """Wait for the end and return the result; raises the error of the call."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._result = self._call(self.report)
        except BaseException as error:  # handed over to the thread that reads the result
            self._error = error


def time_left(seconds: float | None) -> str:
    """Return the time left in words; empty where it is unknown."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"
