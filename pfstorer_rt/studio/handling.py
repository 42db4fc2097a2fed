"""Handlers of the page: one line for every error, and the progress of long calls."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from functools import wraps
from typing import Any, TypeVar

from pfstorer_rt.progress import CancelledError
from pfstorer_rt.studio import fragments
from pfstorer_rt.studio.restoring import EXPECTED, explain
from pfstorer_rt.studio.work import Report, State, Work
from pfstorer_rt.studio.workspace import Session, Workspace

Updates = dict[Any, Any]
"""Component -> new value or update."""
Handler = Callable[..., Iterator[Updates]]
Result = TypeVar("Result")


def handled(workspace: Workspace, line: Any, always: Callable[[], Updates] = dict) -> Callable[[Handler], Handler]:
    """Return a decorator: an error of the handler becomes a line in the component `line`, with names instead of paths.

    always: updates at the end of every call, also after an error.
    """

    def decorate(handler: Handler) -> Handler:
        @wraps(handler)
        def call(*arguments: Any) -> Iterator[Updates]:
            try:
                yield from handler(*arguments)
                if updates := always():  # Gradio shows an error for an empty dictionary
                    yield updates
            except CancelledError:
                yield {line: fragments.status("Cancelled. What was finished is kept."), **always()}
            except Exception as error:
                if not isinstance(error, EXPECTED):
                    traceback.print_exc(file=sys.stderr)
                yield {line: fragments.status(workspace.without_folders(explain(error)), error=True), **always()}

        return call

    return decorate


def follow(
    session: Session, call: Callable[[Report], Result], show: Callable[[State], Updates]
) -> Generator[Updates, None, Result]:
    """Run a call in a thread; yield updates of its states, and return its result."""
    work = Work(call)
    session.work = work
    for state in work.states():
        yield show(state)
    return work.result()
