"""Hostile ONNX graphs in a valid plan: every one is refused before an engine loads it."""

import time
from dataclasses import replace

import pytest
from onnx import TensorProto, helper
from small_plan import field, graphs, small_manifest, small_payloads

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import sha256_bytes
from pfstorer_rt.plan import COMPONENTS, Plan, write_plan


def rewritten(path, component, data, **payload):
    """Write a plan in which one payload has other bytes and other facts in the manifest."""
    payloads = {**small_payloads(), component: data}
    manifest = small_manifest(payloads)
    entry = replace(manifest.payloads[component], **payload)
    return write_plan(path, replace(manifest, payloads={**manifest.payloads, component: entry}), payloads)


@pytest.fixture
def refused(tmp_path):
    """Function (change of a ModelProto, component) -> message of the refusal."""

    def call(change, component="denoiser"):
        model = graphs()[component]
        changed = change(model)
        data = changed if isinstance(changed, bytes) else model.SerializeToString()
        plan, start = rewritten(tmp_path / "a.plan", component, data), time.perf_counter()
        with pytest.raises(BadFileError) as caught:
            plan.read(component)
        assert time.perf_counter() - start < 2
        text = str(caught.value)
        assert text.startswith(f"{plan.path}: the {component} ") and "\n" not in text and len(text) < 600
        return text

    return call


def test_valid_graphs_are_read(tmp_path):
    payloads = small_payloads()
    plan = write_plan(tmp_path / "a.plan", small_manifest(payloads), payloads)
    assert {c: Plan.open(plan.path).read(c) for c in COMPONENTS} == payloads


# ---- operators


def loop(model):
    """Replace the sum by 2^62 iterations of it."""
    body = helper.make_graph([model.graph.node[0]], "body", [], [])
    count = helper.make_tensor("count", TensorProto.INT64, [], [2**62])
    model.graph.initializer.append(count)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Loop", ["count", ""], ["prediction"], body=body))


def test_a_loop_is_refused(refused):
    assert "has subgraphs" in refused(loop)


@pytest.mark.parametrize("operator", ["If", "Loop", "Scan", "StringNormalizer", "RandomNormal", "Range", "PyOp"])
def test_an_operator_that_no_export_writes_is_refused(refused, operator):
    assert repr(operator) in refused(lambda model: setattr(model.graph.node[0], "op_type", operator))


@pytest.mark.parametrize("domain", ["com.microsoft", "evil", "ai.onnx.ml", "\n"])
def test_an_operator_of_another_domain_is_refused(refused, domain):
    assert "which a plan may not have" in refused(lambda model: setattr(model.graph.node[0], "domain", domain))
    opset = helper.make_opsetid(domain, 1)
    assert "needs version 1" in refused(lambda model: model.opset_import.append(opset))


def test_functions_training_and_a_second_graph_are_refused(refused):
    function = helper.make_function("d", "f", ["x"], ["y"], [], [])
    assert "has functions" in refused(lambda model: model.functions.append(function))
    assert "has training" in refused(lambda model: model.training_info.add())
    assert "several graphs" in refused(lambda model: model.SerializeToString() + small_payloads()["encoder"])


def nested(depth):
    """The bytes of an attribute with subgraphs that are nested `depth` times."""
    content = b""
    for _ in range(depth):
        content = field(7, field(1, field(5, field(6, content))))
    return content


def test_deeply_nested_subgraphs_are_refused(refused):
    assert "has subgraphs" in refused(lambda model: nested(3000))


# ---- constants


def constant(dims=(4,), kind=TensorProto.FLOAT, **external):
    tensor = TensorProto(name="c", data_type=kind, dims=dims)
    if external:
        tensor.data_location = TensorProto.EXTERNAL
    for key, value in external.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


@pytest.mark.parametrize("location", ["secret.bin", "../x", "/etc/passwd", "", "denoiser.weights", "a\n\x1b[2J"])
def test_external_data_outside_the_plan_is_refused(refused, location):
    tensor = constant(location=location, offset="0", length="16")
    assert "reads other files" in refused(lambda model: model.graph.initializer.append(tensor))
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    assert "reads other files" in refused(lambda model: model.graph.node.append(node))


@pytest.mark.parametrize(
    ("offset", "length"), [("16", "16"), ("0", "32"), ("-1", "16"), ("0", ""), ("9" * 30, "16"), ("0", "0x10")]
)
def test_external_data_outside_its_file_is_refused(tmp_path, offset, length):
    model = graphs()["denoiser"]
    model.graph.initializer.append(constant(location="denoiser.weights", offset=offset, length=length))
    payloads = {**small_payloads(), "denoiser": model.SerializeToString()}
    (tmp_path / "weights").write_bytes(bytes(16))
    manifest = small_manifest(payloads)
    entry = replace(manifest.payloads["denoiser"], weights="denoiser.weights", weights_sha256=sha256_bytes(bytes(16)))
    manifest = replace(manifest, payloads={**manifest.payloads, "denoiser": entry})
    plan = write_plan(tmp_path / "a.plan", manifest, payloads, {"denoiser": tmp_path / "weights"})
    with pytest.raises(BadFileError, match=r"has the constant 'c' at"):
        plan.read("denoiser")


@pytest.mark.parametrize("dims", [(2**40,), (2**62, 4), (1,) * 9, (1000, 1000), (-1,)])
def test_a_constant_with_more_values_than_bytes_is_refused(refused, dims):
    assert "has the constant 'c'" in refused(lambda model: model.graph.initializer.append(constant(dims)))


def test_a_constant_of_another_type_is_refused(refused):
    tensor = constant((), TensorProto.STRING)
    assert "of type 8" in refused(lambda model: model.graph.initializer.append(tensor))


def test_too_many_nodes_are_refused(refused):
    assert "more than" in refused(lambda model: field(7, field(1, field(4, b"Add")) * 200_000))


# ---- inputs and outputs


def info(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def test_an_undeclared_input_and_a_missing_output_are_refused(refused):
    assert "'secret'" in refused(lambda model: model.graph.input.append(info("secret", [1])))
    assert "has the inputs" in refused(lambda model: model.graph.input.append(info("x", [1])))
    assert "has the outputs []" in refused(lambda model: model.graph.output.pop() and None)
    assert "has the outputs" in refused(lambda model: model.graph.output.append(info("more", [1])))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (["batch", 5, 8, 8], TensorProto.FLOAT),
        (["batch", 4, 16, 16], TensorProto.FLOAT),
        (["batch", 4, 8], TensorProto.FLOAT),
        (["batch", 4, 8, 2**40], TensorProto.FLOAT),
        (["batch", 4, 8, 8], TensorProto.DOUBLE),
        (["batch", 4, 8, 8], TensorProto.STRING),
    ],
)
def test_an_input_unlike_the_manifests_is_refused(refused, shape, kind):
    assert "the manifest names" in refused(lambda model: model.graph.input[0].CopyFrom(info("x", shape, kind)))


CHANGED = {
    "channels": ("encoder", "outputs", "mean", ["batch", 8, "height", "width"]),
    "factor": ("encoder", "inputs", "image", ["batch", 3, "4*height", "4*width"]),
    "factor of the decoder": ("decoder", "outputs", "image", ["batch", 3, "16*height", "16*width"]),
    "fixed side": ("encoder", "inputs", "image", ["batch", 3, 64, 64]),
    "tile": ("denoiser", "inputs", "x", ["batch", 4, 16, 16]),
    "fixed batch": ("denoiser", "inputs", "t", [1]),
    "rank": ("decoder", "inputs", "latent", ["batch", 4]),
    "undeclared": ("denoiser", "inputs", "strength", [1]),
    "weight without features": ("decoder", "inputs", "cfw_weight", [1]),
    "features without wrapping": ("encoder", "outputs", "features_2", ["batch", 8, "2*height", "2*width"]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_manifest_that_describes_no_component_is_refused(tmp_path, name):
    """Graph and manifest agree here, and both are wrong."""
    component, group, port, shape = CHANGED[name]
    model = graphs()[component]
    ports = model.graph.input if group == "inputs" else model.graph.output
    kept = [one for one in ports if one.name != port]
    del ports[:]
    ports.extend([*kept, info(port, shape)])
    data = model.SerializeToString()
    stated = getattr(small_manifest(small_payloads()).payloads[component], group)
    changed = {group: {**stated, port: {"shape": shape, "type": "float32"}}}
    plan = rewritten(tmp_path / "a.plan", component, data, **changed)
    with pytest.raises(BadFileError, match=rf"the {component} has the {group[:-1]}.*; expected"):
        plan.read(component)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_message_is_refused(refused, share):
    text = refused(lambda model: model.SerializeToString()[: int(share * model.ByteSize())], "decoder")
    assert "the decoder is not an ONNX graph" in text


@pytest.mark.parametrize("data", [b"", bytes(200), b"not a graph at all"])
def test_bytes_without_a_graph_are_refused(refused, data):
    assert "the decoder is not an ONNX graph" in refused(lambda model: data, "decoder")
