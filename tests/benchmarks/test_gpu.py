"""The command for a GPU, run on a CPU at nano size."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(output, *stages, minutes=5.0):
    command = [sys.executable, str(SCRIPT), "--minutes", str(minutes), "-o", str(output)]
    command += ["--base", "nano", "--large", "nano", "--device", "cpu"]
    for stage in stages:
        command += ["--stage", stage]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_stages_write_rows_a_table_and_a_report(tmp_path):
    run(tmp_path, "codec", "tensorrt")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["encoder", "decoder", "TensorRT", "TensorRT"]
    assert all(row["ms"] > 0 for row in rows[:2]) and all("error" in row for row in rows[2:])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"] == {"codec": "done", "tensorrt": "done"}
    table = (tmp_path / "table.md").read_text()
    assert "## codec" in table and f"| {rows[0]['ms']} |" in table


def test_a_stage_that_takes_too_long_does_not_stop_the_others(tmp_path):
    printed = run(tmp_path, "parity", "codec", minutes=0.01)
    assert "parity: ended after 0 s" in printed and "codec: ended after 0 s" in printed
    assert json.loads((tmp_path / "report.json").read_text())["stages"].keys() == {"parity", "codec"}


def test_the_stages_share_the_time(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    gpu = importlib.import_module("gpu")
    shares = gpu.limits(("parity", "steps"), 100)
    assert shares == {"parity": 20.0, "steps": 80.0}
    assert gpu.limits(tuple(gpu.STAGES), 600).keys() == gpu.SHARES.keys() == gpu.STAGES.keys()
    assert sum(gpu.limits(tuple(gpu.STAGES), 600).values()) == pytest.approx(600)
