"""`pfstorer-rt evaluate`: the table, the files, inputs made by `--level`, exit status."""

import csv
import json
import sys

import pytest


@pytest.fixture
def folders(save, tmp_path, monkeypatch):
    """refs, hq and out with images a and b; MUSIQ is refused."""
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    save(tmp_path / "refs" / "r.png")
    for seed, name in enumerate("ab"):
        save(tmp_path / "hq" / f"{name}.png", seed=seed)
        save(tmp_path / "out" / f"{name}_restored.png", seed=seed + 5)
    return ["--refs", tmp_path / "refs", "--hq", tmp_path / "hq", "--metrics", "psnr, ssim"]


def test_the_table_has_a_column_for_each_method(run, folders, tmp_path):
    outcome = run(
        "evaluate",
        *folders,
        "--outputs",
        tmp_path / "out",
        "--outputs",
        f"theirs={tmp_path / 'hq'}",
        "--seconds",
        "theirs=1.25",
        "--metrics",
        "psnr,musiq",
    )
    lines = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in outcome.out.splitlines()
        if line.startswith("│")
    }
    assert outcome.status == 1, "a metric that was named is missing"
    assert lines["PSNR dB ↑"][1:] == ["∞", "∞"]
    assert lines["s/image"] == ["", "1.25", ""] and lines["MUSIQ ↑"] == ["-", "-", "-"]
    assert "MUSIQ: not measured: pip install pyiqa" in outcome.out
    assert "out" in outcome.out and "theirs" in outcome.out and "original" in outcome.out


def test_json_has_a_line_for_each_row_and_the_means(run, folders, tmp_path):
    outcome = run("evaluate", *folders, "--outputs", tmp_path / "out", "--json", "--metrics", "psnr,musiq")
    *rows, last = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(row["method"], row["image"]) for row in rows] == [(m, p) for p in "ab" for m in ("out", "original")]
    ours = [row["psnr"] for row in rows if row["method"] == "out"]
    assert last["summary"]["methods"]["out"]["means"]["psnr"] == pytest.approx(sum(ours) / 2)
    assert rows[1]["psnr"] == "inf" and rows[0]["musiq"] is None


def test_inputs_of_a_level_equal_degrade_and_can_be_reused(run, folders, tmp_path, tree):
    bad = tmp_path / "bad"
    first = run("evaluate", *folders, "--level", "light", "--seed", 4, "--save-inputs", bad, "-o", tmp_path / "one")
    assert first.status == 0 and list(tree(bad)) == ["a.png", "b.png"]
    again = run("evaluate", *folders, "--inputs", bad, "-o", tmp_path / "two")
    unsaved = run("evaluate", *folders, "--level", "light", "--seed", 4, "-o", tmp_path / "three")
    reports = [list(csv.reader((tmp_path / name / "results.csv").open())) for name in ("one", "two", "three")]
    assert (again.status, unsaved.status) == (0, 0) and reports[0] == reports[1] == reports[2]
    settings = json.loads((tmp_path / "one" / "summary.json").read_text())["settings"]
    assert (settings["level"], settings["seed"]) == ("light", 4)
    run("degrade", tmp_path / "hq", "-o", tmp_path / "degraded", "--level", "light", "--seed", 4)
    from PIL import Image

    for name in "ab":
        pair = [Image.open(p).tobytes() for p in (bad / f"{name}.png", tmp_path / "degraded" / f"{name}_degraded.png")]
        assert pair[0] == pair[1]
    other = run("evaluate", *folders, "--level", "light", "--seed", 5, "-o", tmp_path / "four")
    assert other.status == 0 and list(csv.reader((tmp_path / "four" / "results.csv").open())) != reports[0]


def test_seconds_are_read_from_the_report_of_restore(run, folders, tmp_path):
    lines = [
        {"input": f"bad/{name}.png", "output": f"out/{name}_restored.png", "status": "done", "seconds": second}
        for name, second in (("a", 1.0), ("b", 2.0))
    ]
    failed = {"input": "bad/c.png", "status": "failed", "error": "no"}
    (tmp_path / "log").write_text("\n".join(json.dumps(line) for line in [*lines, failed]))
    outcome = run("evaluate", *folders, "--outputs", tmp_path / "out", "--seconds", f"out={tmp_path / 'log'}", "--json")
    rows = [json.loads(line) for line in outcome.out.splitlines()[:-1]]
    assert [row["seconds"] for row in rows if row["method"] == "out"] == [1.0, 2.0]


def test_a_missing_result_ends_with_status_1_and_the_others_are_reported(run, folders, tmp_path):
    (tmp_path / "out" / "a_restored.png").unlink()
    outcome = run("evaluate", *folders, "--outputs", tmp_path / "out", "-o", tmp_path / "report")
    assert outcome.status == 1 and "note: out: a: no result" in outcome.err and "(1 of 2)" in outcome.out
    rows = list(csv.DictReader((tmp_path / "report" / "results.csv").open()))
    assert [row["note"] for row in rows if row["method"] == "out"] == ["no result", ""]


def test_existing_files_are_not_overwritten(run, refused, folders, tmp_path, tree):
    out = ["--outputs", tmp_path / "out", "-o", tmp_path / "report"]
    assert run("evaluate", *folders, *out).status == 0
    before = tree(tmp_path / "report")
    refused(2, "evaluate", *folders, *out, words=["report", "--overwrite"])
    assert tree(tmp_path / "report") == before
    assert run("evaluate", *folders, *out, "--seconds", "out=1", "--overwrite").status == 0
    assert tree(tmp_path / "report") != before
    save = ["--level", "light", "--save-inputs", tmp_path / "hq"]
    originals = tree(tmp_path / "hq")
    refused(1, "evaluate", *folders, *save, words=["exists already"])
    assert tree(tmp_path / "hq") == originals


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "nothing to measure"),
        (["--inputs", "x", "--level", "light"], "not both"),
        (["--inputs", "x", "--save-inputs", "y"], "--level"),
        (["--outputs", "input=x"], "'input'"),
        (["--outputs", "a=x", "--outputs", "a=y"], "'a'"),
        (["--outputs", "a=x", "--seconds", "b=1"], "'b'"),
        (["--outputs", "a=x", "--seconds", "a=nan"], "0 or more"),
        (["--outputs", "a=x", "--seconds", "a=-1"], "0 or more"),
        (["--outputs", "a=x", "--seconds", "a=nowhere"], "JSON"),
        (["--outputs", "a=x", "--seconds", "a"], "NAME=FILE"),
        (["--outputs", "absent"], "no such folder"),
        (["--outputs", "a=x", "--metrics", "beauty"], "beauty"),
    ],
)
def test_invalid_calls_exit_with_2(refused, folders, arguments, word):
    refused(2, "evaluate", *folders, *arguments, words=[word])
