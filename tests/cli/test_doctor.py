"""`doctor`."""

import json
import sys

import pytest


def test_doctor_reports_every_backend(run):
    from pfstorer_rt.engine.session import BACKENDS
    from pfstorer_rt.ops import BACKENDS as ATTENTION

    report = json.loads(run("doctor", "--json").out)
    assert set(report["engines"]) == {"torch", *BACKENDS} and set(report["attention"]) == set(ATTENTION)
    assert report["engines"]["onnxruntime"] is None and report["attention"]["reference"] is None
    for refusals in (report["engines"], report["attention"], report["metrics"]):
        assert all(reason is None or len(reason) > 10 for reason in refusals.values())
    text = run("doctor").out
    assert "engine    onnxruntime: ready" in text and report["home"] in text


def homes(folder):
    (folder / "file").write_bytes(b"")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "full" / "identities").mkdir(parents=True)
    (folder / "full" / "identities" / "odd.safetensors").mkdir()
    return folder / "file", folder / "file" / "below", folder / "loop", folder / ("x" * 300), folder / "full"


@pytest.mark.parametrize("number", range(5))
def test_a_data_directory_that_cannot_be_read_is_one_line(run, refused, monkeypatch, tmp_path, number):
    home = homes(tmp_path)[number]
    monkeypatch.setenv("PFSTORER_HOME", str(home))
    result = run("doctor")
    (line,) = (line for line in result.out.splitlines() if line.startswith("home"))
    assert result.status == 0 and not result.errors and str(home) in line
    if number < 4:
        assert "this folder cannot be read" in line and "PFSTORER_HOME" in line
        assert json.loads(run("doctor", "--json").out)["home_refusal"] in line
        assert "this folder cannot be read" in refused(2, "identities", "list")


def test_doctor_lists_the_identities_once(run, people, monkeypatch):
    from pfstorer_rt import identity

    lists = []
    listed = identity.list_identities
    monkeypatch.setattr(identity, "list_identities", lambda: lists.append(1) or listed())
    report = json.loads(run("doctor", "--json").out)
    assert (report["identities"], report["home_refusal"], len(lists)) == (1, None, 1)


def test_doctor_names_the_packages_to_install(run, monkeypatch):
    for name in ("openvino", "stlpips_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    report = json.loads(run("doctor", "--json").out)
    assert "pip install" in report["engines"]["openvino"] and "pip install" in report["metrics"]["st-lpips"]
