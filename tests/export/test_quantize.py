from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization.calibrate import HistogramCollector
from pfstorer_rt.export import build, quantize
from pfstorer_rt.export.build import export_plan
from pfstorer_rt.export.compare import check_rows
from pfstorer_rt.export.quantize import calibration_inputs, calibration_tiles

from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.engine.openvino import OpenVinoSession
from pfstorer_rt.engine.session import open_session
from pfstorer_rt.errors import ParityError
from pfstorer_rt.models.components import components, decoder, denoiser
from pfstorer_rt.plan import COMPONENTS
from pfstorer_rt.runtime.restorer import Restorer


@pytest.fixture(scope="module")
def int8_plan(nano_base, nano_identity, nano_plan, tmp_path_factory):
    """An int8 plan; its graphs are exported once for this plan and the fp32 plan."""
    return export_plan(tmp_path_factory.mktemp("int8") / "int8.plan", nano_identity, nano_base, precision="int8")


def test_int8_plans_agree_with_fp32_plans(int8_plan, nano_plan, make_image):
    pixels = make_image(70, 90)
    for backend in ("onnxruntime", "openvino"):
        with Restorer.from_plan(nano_plan.path, backend) as full, Restorer.from_plan(int8_plan.path, backend) as low:
            error = np.mean((full.restore(pixels).astype(np.float64) - low.restore(pixels)) ** 2)
        assert 1e-8 < error < 1e-3  # over 30 dB, and not the same network


@pytest.mark.parametrize("component", COMPONENTS)
def test_all_convolutions_and_products_with_weights_use_8_bits(int8_plan, component):
    assert int8_plan.manifest.payloads[component].precision == int8_plan.manifest.precision == "int8"
    graph = onnx.load_from_string(int8_plan.read(component)).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    counted = 0
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            assert [makers.get(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2, node.name
            counted += 1
    assert counted > 4
    floats = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 4}
    constant = (".k", ".v")  # keys and values of attention to a constant context
    assert not {name for name in floats if not name.endswith(constant)}  # no kernel is stored in fp32 too


@pytest.mark.parametrize("component", COMPONENTS)
def test_two_products_fit_in_16_bits(int8_plan, component):
    """What processors without VNNI add up before they widen: two of an activation (0 to 255) and a weight."""
    graph = onnx.load_from_string(int8_plan.read(component)).graph
    kernels = [onnx.numpy_helper.to_array(i) for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
    largest = max(int(np.abs(k.astype(int)).max()) for k in kernels if k.ndim > 1)
    assert largest > 32 and 2 * 255 * largest < 2**15


@pytest.mark.parametrize("component", COMPONENTS)
def test_openvino_rounds_only_inputs_of_8_bit_operators(int8_plan, component):
    with OpenVinoSession(int8_plan.read(component), "CPU:f32") as session:
        makers = {op.get_friendly_name(): op for op in session._network.get_ops()}
        native = "BF16" in session._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        kinds = [op.get_type_name() for op in makers.values()]
        read = sum(reads_rounded(op) for op in makers.values())
        assert 0 < kinds.count("FakeQuantize") <= read  # one rounded tensor may have several readers
    with OpenVinoSession(int8_plan.read(component)) as session:
        assert session.provider.endswith(" bf16 and int8" if native else " f32 and int8")


def reads_rounded(op):
    """Whether an operator is a convolution or product whose activation comes out of a rounding."""
    if op.get_type_name() not in ("Convolution", "MatMul"):
        return False
    maker = op.input_value(0).get_node()
    while maker.get_type_name() in ("Multiply", "Subtract", "Convert"):
        maker = maker.input_value(0).get_node()
    return maker.get_type_name() == "FakeQuantize"


@pytest.mark.parametrize("component", ["encoder", "decoder"])
def test_openvino_int8_is_closer_to_fp32_than_onnxruntime_int8(int8_plan, nano_plan, nano_base, component):
    inputs = list(calibration_inputs(components(nano_base)[component]))[3]
    errors = {}
    with open_session(nano_plan, component, "onnxruntime") as session:
        exact = session.run(**inputs)[session.outputs[0]]
    for backend in ("onnxruntime", "openvino"):
        with open_session(int8_plan, component, backend, "CPU:f32" if backend == "openvino" else None) as session:
            errors[backend] = np.square(session.run(**inputs)[session.outputs[0]] - exact).mean()
    assert 0 < errors["openvino"] < errors["onnxruntime"]


def test_ranges_are_measured_on_clean_and_degraded_photographs():
    pairs = list(calibration_tiles(64))
    assert len(pairs) == quantize.SAMPLES
    for i, (lq, hq) in enumerate(pairs):
        assert lq.shape == hq.shape == (1, 3, 64, 64) and max(lq.abs().max(), hq.abs().max()) <= 1
        assert (lq - hq).abs().mean() > 0.02 if i % 2 else torch.equal(lq, hq)
        assert hq.std() > 0.1


def test_the_denoiser_is_measured_at_every_noise_level(nano_base, nano_identity):
    inputs = list(calibration_inputs(denoiser(nano_base, nano_identity)))
    for level in (inputs[::2], inputs[1::2]):  # clean and degraded images
        assert {float(one["t"][0]) for one in level} == set(quantize.TIMESTEPS)
    for one in inputs:
        assert set(one) == {"x", "t", "z_lq", "strength"}
    noisiest = [one["x"].std() for one in inputs if one["t"][0] == 999]
    assert abs(np.mean(noisiest) - 1) < 0.1  # noise, whatever the latent is


def test_a_graph_that_is_wrong_in_fp32_is_not_quantized(nano_base, tmp_path, monkeypatch):
    expect = build.expect

    def expect_other(*arguments):
        expected = expect(*arguments)
        return replace(expected, outputs=[[a + 0.1 for a in arrays] for arrays in expected.outputs])

    monkeypatch.setattr(build, "expect", expect_other)
    monkeypatch.setattr(build, "quantize", lambda *_: pytest.fail("a wrong graph was quantized"))
    with pytest.raises(ParityError, match=r"encoder: the largest error of the exported graph .* in fp32"):
        export_plan(tmp_path / "a.plan", None, nano_base, precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_large_graph_is_measured_image_by_image_with_separate_weights(nano_base, tmp_path, monkeypatch):
    held, collect = [], HistogramCollector.collect

    def look(self, arrays):
        held.extend(len(found) for found in arrays.values())
        collect(self, arrays)

    monkeypatch.setattr(HistogramCollector, "collect", look)
    component = decoder(nano_base)
    expected = build.expect(component, "int8")

    def export(folder):
        said = build.Progress()
        full = build.export_component(component, "fp32", expected.ordinary, True, folder, said)
        return build.quantize_component(full, component, expected.probes, said)

    small = export(tmp_path / "small")
    monkeypatch.setattr(build, "SELF_CONTAINED", 1 << 10)
    large = export(tmp_path / "large")
    assert set(held) == {1}
    assert large.message is None
    assert {file.name for file in large.model.parent.iterdir()} == {"model.onnx", "decoder.weights"}
    integers = [i for i in onnx.load(large.model).graph.initializer if i.data_type == onnx.TensorProto.INT8]
    kernels = sum(int(np.prod(i.dims)) for i in integers if len(i.dims) > 1)
    assert kernels // 2 < large.weights.stat().st_size < 2 * kernels  # bytes; small tensors are stored in the graph
    inputs = {name: tensor.numpy() for name, tensor in expected.inputs[0].items()}
    with OnnxRuntimeSession(small.message) as one, OnnxRuntimeSession(large.model) as other:
        np.testing.assert_array_equal(one.run(**inputs)["image"], other.run(**inputs)["image"])


def test_int8_is_refused_for_engines(nano_base, tmp_path):
    with pytest.raises(ValueError, match="precision int8 with target 'tensorrt-rtx'"):
        export_plan(tmp_path / "a.plan", None, nano_base, "tensorrt-rtx", "int8")
    assert list(tmp_path.iterdir()) == []


def test_pure_noise_is_not_checked_in_int8():
    row = {"component": "image", "tile": "noise", "pair": "torch / openvino", "finite": True, "psnr": 22.0}
    check_rows([row], "int8")
    for wrong, precision in (({**row, "tile": "photo"}, "int8"), (row, "fp16"), ({**row, "finite": False}, "int8")):
        with pytest.raises(ParityError):
            check_rows([wrong], precision)
