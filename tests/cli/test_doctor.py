"""`doctor`."""

import json
import sys


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


def test_doctor_names_the_packages_to_install(run, monkeypatch):
    for name in ("openvino", "stlpips_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    report = json.loads(run("doctor", "--json").out)
    assert "pip install" in report["engines"]["openvino"] and "pip install" in report["metrics"]["st-lpips"]
