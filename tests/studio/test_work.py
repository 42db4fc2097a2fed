"""A call in a thread: progress, time left, cancellation, errors."""

import threading

import pytest

from pfstorer_rt.progress import CancelledError
from pfstorer_rt.studio.handling import handled
from pfstorer_rt.studio.work import State, Work, time_left


def test_states_and_result():
    go = threading.Event()

    def call(report):
        report("half", 0.5, extra=["picture"])
        go.wait(10)
        return "done"

    times = iter([100.0, 110.0])
    work = Work(call, clock=lambda: next(times))
    state = next(work.states(0.01))
    go.set()
    assert state == State("half", 0.5, 10.0, ["picture"])
    assert work.result() == "done"


def test_a_cancelled_call_stops_at_its_next_report():
    steps = []

    def call(report):
        for step in range(1000):
            steps.append(step)
            if step == 3:
                work.cancel()
            report("step")

    ready = threading.Event()
    work = Work(lambda report: (ready.wait(10), call(report)))
    ready.set()
    with pytest.raises(CancelledError):
        work.result()
    assert steps == [0, 1, 2, 3]


def test_an_error_is_raised_where_the_result_is_read():
    def fail(report):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        Work(fail).result()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.2, "about 1 s left"), (75, "about 75 s left"), (600, "about 10 min left")]
)
def test_time_left(seconds, text):
    assert time_left(seconds) == text


def test_a_handler_without_final_updates_adds_no_empty_one(workspace):
    """Gradio shows an error for an empty dictionary."""
    handler = handled(workspace, "line")(lambda: iter([{"line": "done"}]))
    assert list(handler()) == [{"line": "done"}]
    handler = handled(workspace, "line", lambda: {"button": "free"})(lambda: iter([{"line": "done"}]))
    assert list(handler()) == [{"line": "done"}, {"button": "free"}]
