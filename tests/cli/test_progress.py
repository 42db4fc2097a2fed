"""Progress in a log, where stderr is no terminal."""

from pathlib import Path

from pfstorer_rt.cli.progress import LogLines
from pfstorer_rt.runtime.jobs import Job


def test_a_long_image_prints_its_state_at_intervals_and_a_short_one_nothing(capsys):
    now = 0.0
    lines = LogLines(lambda: now)
    short, long = Job(Path("a.jpg"), None, False), Job(Path("b\n.jpg"), None, False)
    lines(short, 0, 0)
    for done in range(1, 5):
        now += 1
        lines(short, done, 4)
    lines(long, 0, 0)
    for done in range(1, 101):
        now += 1
        lines(long, done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "b\\n.jpg: 20 of 100 tiles, about 80 s left",
        "b\\n.jpg: 40 of 100 tiles, about 60 s left",
        "b\\n.jpg: 60 of 100 tiles, about 40 s left",
        "b\\n.jpg: 80 of 100 tiles, about 20 s left",
        "b\\n.jpg: correcting colours, writing",
    ]
