from dataclasses import replace

import numpy as np
import onnx
import pytest
from pfstorer_rt.export import compare, export_plan
from pfstorer_rt.export.compare import check_rows, compare_plan, differences

from pfstorer_rt.errors import MissingBackendError, ParityError
from pfstorer_rt.files import sha256_bytes
from pfstorer_rt.plan import COMPONENTS, Plan, write_plan

TILES = ["photo", "grey", "black", "white", "noise"]


def changed(plan, path, component, edit):
    """The plan with one component's graph edited."""
    model = onnx.load_from_string(plan.read(component))
    edit(model.graph)
    parts = {c: plan.read(c) for c in COMPONENTS} | {component: model.SerializeToString()}
    payloads = dict(plan.manifest.payloads)
    payloads[component] = replace(payloads[component], sha256=sha256_bytes(parts[component]))
    return write_plan(path, replace(plan.manifest, payloads=payloads), parts)


def scale_largest(factor):
    def edit(graph):
        largest = max(graph.initializer, key=lambda i: int(np.prod(i.dims)) if i.data_type == 1 else 0)
        array = onnx.numpy_helper.to_array(largest) * np.float32(factor)
        largest.CopyFrom(onnx.numpy_helper.from_array(array, largest.name))

    return edit


@pytest.fixture
def one_backend(monkeypatch):
    """ONNX Runtime alone runs the plan; `test_a_plan_agrees_with_pytorch` runs it on every backend."""
    monkeypatch.setattr(compare, "BACKENDS", {"onnxruntime": compare.BACKENDS["onnxruntime"]})


def test_a_plan_agrees_with_pytorch(nano_plan, nano_base, nano_identity):
    rows = compare_plan(nano_plan, nano_identity, nano_base)
    parts = [r for r in rows if r["component"] != "image" and r["pair"] == "torch / onnxruntime"]
    assert [(r["component"], r["tile"]) for r in parts] == [(c, t) for c in COMPONENTS for t in TILES]
    for row in parts:
        assert row["finite"] and 0 <= row["mean"] <= row["max"] < 1e-4 and abs(row["cosine_distance"]) < 1e-5
    assert any(row["max"] > 0 for row in parts)  # two engines never round alike everywhere
    images = [r for r in rows if r["component"] == "image" and r["pair"] == "torch / onnxruntime"]
    assert [r["tile"] for r in images] == TILES and all(r["psnr"] > 80 for r in images)
    check_rows(rows)


def test_differences_are_measured_on_the_worst_output():
    expected = {"a": np.array([[0.0, 3.0, 4.0]], np.float32), "b": np.array([1.0, 0.0], np.float32)}
    found = {"a": np.array([[0.0, 4.0, 3.0]], np.float32), "b": np.array([3.0, 0.0], np.float32)}
    figures = {"finite": True, "max": 2.0, "mean": 1.0, "cosine_distance": 1 - 24 / 25}
    assert differences(found, expected) == pytest.approx(figures)
    found["b"][1] = np.nan
    assert differences(found, expected)["finite"] is False


def test_an_untrained_identity_is_compared(nano_base, make_nano_identity, tmp_path, one_backend):
    nobody = make_nano_identity(gammas=(0.0,) * 4)
    plan = export_plan(tmp_path / "a.plan", nobody, nano_base)
    assert not plan.manifest.strength
    check_rows(compare_plan(plan, nobody, nano_base))


def test_a_plan_that_differs_is_refused(base_plan, nano_base, tmp_path, one_backend):
    plan = changed(base_plan, tmp_path / "a.plan", "decoder", scale_largest(100.0))
    rows = compare_plan(plan, None, nano_base)
    assert max(r["max"] for r in rows if r["component"] == "decoder") > 1e-2
    assert max(r["max"] for r in rows if r["component"] == "encoder") < 1e-4
    with pytest.raises(ParityError, match=r"the restored \w+ tile agrees to [\d.]+ dB .*expected 45"):
        check_rows(rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(base_plan, nano_base, tmp_path, one_backend, value):
    plan = changed(base_plan, tmp_path / "a.plan", "encoder", scale_largest(value))
    with pytest.raises(ParityError, match=r"encoder on photo \(torch / onnxruntime\) is not finite"):
        check_rows(compare_plan(plan, None, nano_base))


def test_a_plan_without_a_backend_is_refused(base_plan, nano_base, without_gpu):
    plan = Plan(base_plan.path, replace(base_plan.manifest, target="tensorrt-rtx"))
    with pytest.raises(MissingBackendError, match="nothing here runs this tensorrt-rtx plan: TensorRT needs an NVIDIA"):
        compare_plan(plan, None, nano_base)
