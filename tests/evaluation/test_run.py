"""An evaluation as one call of the library: what is degraded, read, measured and written."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.evaluation.run import EvaluateConfig, read_seconds, run_evaluation


@pytest.fixture
def config(tmp_path, make_image):
    """Settings for originals a and b and their results, measured by PSNR alone."""
    for seed, name in enumerate(("refs/r", "hq/a", "hq/b", "out/a", "out/b")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((make_image(24, 20, seed) * 255).round().astype(np.uint8)).save(path)
    return EvaluateConfig(tmp_path / "refs", tmp_path / "hq", {"ours": tmp_path / "out"}, metrics=("psnr",))


def test_the_report_is_written_with_the_degraded_inputs_and_the_times(config, tmp_path):
    (tmp_path / "log").write_text('{"input": "bad/a.png", "seconds": 2.0}\n\n{"input": "bad/b.png", "error": "no"}\n')
    done = []
    config = replace(
        config,
        level="light",
        seed=3,
        save_inputs=tmp_path / "bad",
        seconds={"ours": tmp_path / "log", "input": 0.5},
        report=tmp_path / "report",
    )
    report = run_evaluation(config, lambda *step: done.append(step))
    rows = list(csv.DictReader((tmp_path / "report" / "results.csv").open()))
    assert [(row["method"], row["seconds"]) for row in rows if row["image"] == "a"] == [
        ("input", "0.5"),
        ("ours", "2.0"),
        ("original", ""),
    ]
    assert done == [(1, 2), (2, 2)] and report.methods == ["input", "ours", "original"]
    assert sorted(path.name for path in (tmp_path / "bad").iterdir()) == ["a.png", "b.png"]
    settings = json.loads((tmp_path / "report" / "summary.json").read_text())["settings"]
    assert (settings["level"], settings["seed"]) == ("light", 3)
    assert settings["folder of input"] == str(tmp_path / "bad")


def test_inputs_that_are_not_saved_give_the_same_measurements_and_leave_nothing(config, tmp_path):
    level = replace(config, level="heavy", seed=1)
    saved = run_evaluation(replace(level, save_inputs=tmp_path / "bad"))
    before = sorted(tmp_path.rglob("*"))
    unsaved = run_evaluation(level)
    assert [row.figures for row in unsaved.rows] == [row.figures for row in saved.rows]
    assert unsaved.settings["folder of input"] == "not kept" and sorted(tmp_path.rglob("*")) == before


def test_an_existing_report_is_refused_before_any_measurement(config, tmp_path):
    config = replace(config, report=tmp_path / "report")
    run_evaluation(config)
    before = (tmp_path / "report" / "results.csv").read_bytes()
    (tmp_path / "out" / "a.png").unlink()
    with pytest.raises(SettingError, match="contains a report already") as refusal:
        run_evaluation(config)
    assert refusal.value.setting == "overwrite"
    assert (tmp_path / "report" / "results.csv").read_bytes() == before
    run_evaluation(replace(config, overwrite=True))
    assert (tmp_path / "report" / "results.csv").read_bytes() != before


@pytest.mark.parametrize(
    ("changes", "setting", "words"),
    [
        ({"inputs": "x", "level": "light"}, "level", "not both"),
        ({"outputs": {}}, "outputs", "nothing to measure"),
        ({"save_inputs": "x"}, "level", "nothing to save"),
        ({"seconds": {"theirs": 1.0}}, "seconds", "'theirs': expected a method, ours or input"),
        ({"seconds": {"ours": float("nan")}}, "seconds", "0 or more"),
    ],
)
def test_contradicting_settings_name_the_setting(config, changes, setting, words):
    with pytest.raises(SettingError, match=words) as refusal:
        replace(config, **changes)
    assert refusal.value.setting == setting


@pytest.mark.parametrize("text", [None, "1,5", "[]", '{"seconds": 1}', '{"input": "a", "seconds": "x"}'])
def test_another_file_has_no_times(tmp_path, text):
    if text is not None:
        (tmp_path / "log").write_text(text)
    with pytest.raises(BadFileError, match="log: neither a number nor a file of JSON lines"):
        read_seconds(tmp_path / "log")
