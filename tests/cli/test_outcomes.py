"""The line that a command prints for a restored image."""

from pathlib import Path

import pytest

from pfstorer_rt.cli.outcomes import line
from pfstorer_rt.runtime.batch import Outcome
from pfstorer_rt.runtime.jobs import Job

JOB = Job(Path("old.jpg"), Path("new.png"), explicit=True)


@pytest.mark.parametrize(
    ("details", "end"),
    [
        ({}, ""),
        ({"id_distance": 0.33321, "id_distance_input": 0.3592}, ", identity distance 0.333 (input 0.359)"),
        ({"id_distance": 0.4, "id_distance_input": None}, ", identity distance 0.400"),
        ({"id_distance": None, "id_distance_input": 0.5}, ""),
    ],
)
def test_the_line_ends_with_the_distances_to_the_references(details, end):
    assert line(Outcome(JOB, "done", 512, 256, 3.14, details=details)) == f"new.png: 512x256, 3.1 s{end}"


def test_a_forecast_has_the_notes_of_the_image():
    names = ("width", "height", "tiles", "batch", "steps", "codec_tiles", "predicted_peak_mb", "predicted_seconds")
    planned = Outcome(JOB, "planned", notes=("no face found in the rectangle",), details=dict.fromkeys(names, 1))
    assert line(planned).endswith(" 1 MB of memory and 1.0 s (no face found in the rectangle)")
