import math

import pytest

from pfstorer_rt.console import LINES, stage_bars
from pfstorer_rt.progress import StageProgress


@pytest.fixture
def shown(capsys):
    """Function (reports) -> lines on stderr, which is no terminal here."""

    def show(*reports):
        with stage_bars() as on_progress:
            for report in reports:
                on_progress(StageProgress(*report))
        return capsys.readouterr().err.splitlines()

    return show


def test_without_a_terminal_a_stage_is_a_few_lines(shown):
    lines = shown(("restorer", 0, 30), *(("restorer", i, 30, 0.5, i / 2) for i in range(1, 31)))
    assert len(lines) == LINES
    assert lines[0] == "restorer: 3/30  loss 0.5000  2.00/s" and lines[-1].startswith("restorer: 30/30  ")


def test_a_slow_stage_has_a_line_each_minute(shown):
    lines = shown(("person", 0, 1000), *(("person", i, 1000, 0.5, 25.0 * i) for i in range(1, 10)))
    assert [line.split("/")[0] for line in lines] == ["person: 3", "person: 6", "person: 9"]


def test_the_loss_is_the_mean_of_the_last_samples(shown):
    losses = [1000.0] * 30 + [1.0, 3.0] * 10
    lines = shown(("person", 0, 50), *(("person", i + 1, 50, loss, i / 2) for i, loss in enumerate(losses)))
    assert lines[-1].startswith("person: 50/50  loss 2.0000  ")


def test_a_resumed_stage_is_named_and_its_speed_is_that_of_this_run(shown):
    lines = shown(("restorer", 15, 30), ("restorer", 18, 30, 0.5, 1.5))
    assert lines == ["restorer: resuming from 15/30", "restorer: 18/30  loss 0.5000  2.00/s"]


def test_a_stage_without_losses_shows_none(shown):
    assert shown(("pairs", 0, 40), ("pairs", 40, 40, math.nan, 2.0)) == ["pairs: 40/40  20.00/s"]


def test_a_stage_of_few_photographs_has_no_lines(shown):
    assert shown(*(("photographs", i, 5) for i in range(6))) == []


def test_a_chunk_of_several_tenths_is_one_line(shown):
    assert shown(("pairs", 0, 100), ("pairs", 64, 100), ("pairs", 100, 100)) == ["pairs: 64/100", "pairs: 100/100"]


def test_a_stage_that_an_earlier_run_finished_is_named(shown):
    assert shown(("pairs", 100, 100)) == ["pairs: finished by an earlier run"]


def test_a_stage_that_ends_after_a_time_shows_its_share(shown):
    lines = shown(("tiles", 0, None), ("tiles", 40, None, 0.5, 20.0, 0.25))
    assert lines == ["tiles: iteration 40 (25% of the time)  loss 0.5000  2.00/s"]
