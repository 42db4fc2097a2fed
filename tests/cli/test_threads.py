"""Trainings use the cores that other programs leave free."""

import time

import pytest
import torch

from pfstorer_rt.cli import threads
from pfstorer_rt.cli.threads import Usage, free_cores_only


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("others", "expected"), [(0.0, 4), (0.4, 4), (0.6, 3), (2.9, 1), (4.0, 1), (9.0, 1), (-0.2, 4)]
)
def test_a_thread_for_each_core_that_is_free(others, expected):
    before, after = Usage(10.0, 500.0, 3.0), Usage(12.0, 500.0 + 2 * (others + 0.75), 4.5)  # 0.75 cores are our own
    assert threads.threads(4, 4, before, after) == expected


def test_more_cores_than_threads():
    assert threads.threads(4, 16, Usage(0, 0, 0), Usage(1, 5, 0)) == 4


def measured(monkeypatch, seconds, others):
    """Run an empty block that lasts `seconds`, beside programs that use `others` cores; returns the threads."""
    usages = iter([Usage(0, 0, 0), Usage(seconds, seconds * others, 0)])
    monkeypatch.setattr(Usage, "now", lambda: next(usages))
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    with free_cores_only():
        pass
    return torch.get_num_threads()


def test_the_load_sets_the_threads(monkeypatch, four_threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert measured(monkeypatch, 2.0, 3.0) == 1


def test_a_short_measurement_changes_nothing(monkeypatch, four_threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert measured(monkeypatch, 0.1, 3.0) == 4


def test_the_choice_of_the_user_remains(monkeypatch, four_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert measured(monkeypatch, 2.0, 3.0) == 4


def test_own_processor_time_is_no_load_of_others():
    before, end = Usage.now(), time.monotonic() + 0.6
    while time.monotonic() < end:
        pass
    after = Usage.now()
    assert after.own - before.own > 0.2
    assert after.cores - before.cores >= after.own - before.own - 0.1
