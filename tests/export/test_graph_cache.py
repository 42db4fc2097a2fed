"""The cache of traced graphs: what its keys depend on, and what becomes of a damaged file."""

import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from pfstorer_rt.export import graph, graph_cache, parity
from pfstorer_rt.export.trace import trace
from torch import nn

from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.components import Component, components, decoder, denoiser
from pfstorer_rt.models.precision import TypedComponent
from pfstorer_rt.onnx_message import read_graph


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), 3.0
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("one", torch.ones(()))
        self.plain = torch.zeros(2)


def changed(change):
    layer = Layer()
    change(layer)
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.linear.weight.data.mul_(2),
        lambda layer: layer.hidden.add_(1),
        lambda layer: layer.one.add_(1),
        lambda layer: layer.register_forward_hook(torch.relu).remove(),
    ],
)
def test_values_do_not_change_the_key(change):
    assert graph_cache.graph_key(changed(change), {}) == graph_cache.graph_key(Layer(), {})


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "scale", 4.0),
        lambda layer: layer.plain.add_(1),  # neither a parameter nor a buffer: a constant of the graph
        lambda layer: setattr(layer, "extra", nn.Identity()),
        lambda layer: setattr(layer, "linear", nn.Linear(2, 3)),
        lambda layer: layer.register_forward_hook(torch.relu),
        lambda layer: layer.half(),
    ],
)
def test_a_change_of_the_structure_changes_the_key(change):
    assert graph_cache.graph_key(changed(change), {}) != graph_cache.graph_key(Layer(), {})


def test_free_axes_options_and_the_environment_belong_to_the_key(monkeypatch):
    key = graph_cache.graph_key(Layer(), {"hidden": (None,)}, 1)
    longer = changed(lambda layer: layer.register_buffer("hidden", torch.zeros(3), persistent=False))
    assert graph_cache.graph_key(longer, {"hidden": (None,)}, 1) == key
    assert graph_cache.graph_key(longer, {}, 1) != graph_cache.graph_key(Layer(), {}, 1)
    assert graph_cache.graph_key(Layer(), {"hidden": (None,)}, 2) != key
    monkeypatch.setattr(graph_cache, "environment", lambda: "other versions")
    assert graph_cache.graph_key(Layer(), {"hidden": (None,)}, 1) != key


@pytest.mark.parametrize("call", [lambda layer: lambda: 1, lambda layer: layer.extra], ids=["local", "cycle"])
def test_a_module_with_a_local_function_or_a_cycle_has_no_key(call):
    layer = changed(lambda layer: setattr(layer, "extra", {}))
    layer.extra["call"] = call(layer)
    assert graph_cache.graph_key(layer, {}) is None


def test_equal_values_may_be_one_object_or_two():
    pair = [1, 2]
    one, two = (
        changed(lambda layer, pairs=pairs: setattr(layer, "pairs", pairs)) for pairs in ([pair, pair], [pair, [1, 2]])
    )
    assert graph_cache.graph_key(one, {}) == graph_cache.graph_key(two, {})


def test_a_shared_weight_belongs_to_the_key():
    shared, separate = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    shared[1].weight = shared[0].weight
    assert graph_cache.graph_key(shared, {}) != graph_cache.graph_key(separate, {})


def typed(component, precision="fp32"):
    return TypedComponent(graph.fuse(component).module, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bases_of_one_architecture_have_the_keys_of_their_components_in_common(precision, nano_base_dir):
    bases = (components(base) for base in (build_base("nano", seed=1), load_base(nano_base_dir)))
    first, second = ([graph_cache.graph_key(typed(part, precision), {}) for part in parts.values()] for parts in bases)
    assert first == second and None not in first and len(set(first)) == 3


def test_the_sources_of_all_networks_are_part_of_the_environment(nano_base, nano_identity):
    used = set()
    for component in components(nano_base, nano_identity).values():
        for module in typed(component).modules():
            used |= {type(module), type(getattr(module, "processor", None))}
    own = {Path(inspect.getfile(kind)) for kind in used if kind.__module__.startswith("pfstorer_rt.")}
    assert len(own) > 5 and own <= set(graph_cache.sources())


@pytest.mark.slow
def test_another_process_computes_the_same_key(nano_base):
    code = (
        "from pfstorer_rt.export import graph, graph_cache; from pfstorer_rt.models.base import build_base;"
        "from pfstorer_rt.models.components import denoiser; from pfstorer_rt.models.precision import TypedComponent;"
        "module = TypedComponent(graph.fuse(denoiser(build_base('nano', 3))).module, 'fp16');"
        "print(graph_cache.graph_key(module, {}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True, text=True)
    assert found.stdout.strip() == graph_cache.graph_key(typed(denoiser(nano_base), "fp16"), {})


def small_graph(location=None):
    """A serialized model with one constant, which may lie in another file."""
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"]
    constant = helper.make_tensor("c", TensorProto.FLOAT, [1], [2.0])
    if location:
        constant.data_location = TensorProto.EXTERNAL
        constant.external_data.add(key="location", value=location)
    node = helper.make_node("Add", ["x", "c"], ["y"])
    return helper.make_model(helper.make_graph([node], "g", *ports, [constant])).SerializeToString()


def test_a_graph_is_read_as_it_was_written_by_its_owner_only(own_graphs):
    assert graph_cache.load_graph("k") is None
    graph_cache.save_graph("k", small_graph())
    assert graph_cache.load_graph("k") == small_graph()
    assert (own_graphs / "k").stat().st_mode & 0o077 == 0


def signed(model):
    return hashlib.sha256(model).digest() + model


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"damaged",
        signed(small_graph())[:-1],
        signed(small_graph()).replace(b"Add", b"Sub"),
        signed(b"no graph"),
        signed(small_graph(location="/etc/passwd")),
    ],
    ids=["empty", "short", "cut", "changed", "no graph", "other file"],
)
def test_a_damaged_file_or_one_that_reads_others_is_traced_again(own_graphs, monkeypatch, nano_base, data):
    traces = []
    monkeypatch.setattr(graph, "trace", lambda *arguments: traces.append(1) or small_graph())
    component = graph.fuse(decoder(nano_base))
    arguments = TypedComponent(component.module, "fp32"), component, {}, {}, lambda *step: None
    graph.traced(*arguments)
    (file,) = own_graphs.iterdir()
    whole = file.read_bytes()
    assert graph.traced(*arguments) == small_graph() and len(traces) == 1
    file.write_bytes(data)
    assert graph.traced(*arguments) == small_graph() and len(traces) == 2
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("pfstorer_rt.files.graph_folder", lambda: tmp_path / "file" / "graphs")
    graph_cache.save_graph("k", small_graph())
    assert graph_cache.load_graph("k") is None


def test_the_graphs_that_were_not_used_for_the_longest_time_are_removed(own_graphs, monkeypatch):
    monkeypatch.setattr(graph_cache, "KEPT", 2)
    for age, key in ((30, "a"), (20, "b")):
        graph_cache.save_graph(key, small_graph())
        os.utime(own_graphs / key, (1e9 - age, 1e9 - age))
    graph_cache.load_graph("a")
    graph_cache.save_graph("c", small_graph())
    assert sorted(path.name for path in own_graphs.iterdir()) == ["a", "c"]


def test_a_kept_graph_with_other_weights_equals_a_graph_traced_with_them(own_graphs, monkeypatch):
    first, second = (decoder(build_base("nano", seed)) for seed in (0, 1))
    graph.build_graph(graph.fuse(first))
    with monkeypatch.context() as patch:
        patch.setattr(graph, "trace", None)
        bound = graph.build_graph(graph.fuse(second)).to_bytes()
    (file,) = own_graphs.iterdir()
    file.unlink()
    assert graph.build_graph(graph.fuse(second)).to_bytes() == bound


def test_people_with_other_reference_sizes_share_a_traced_graph(nano_base, make_nano_identity, monkeypatch):
    alice, bob = (make_nano_identity(gammas=(1.0,) * 4, seed=seed) for seed in (1, 2))
    for name, mask in list(bob.tensors.items()):
        if name.startswith("mask."):
            bob.tensors[name] = torch.arange(len(mask)) < max(1, len(mask) // 3)
    graph.build_graph(graph.fuse(denoiser(nano_base, alice)))
    monkeypatch.setattr(graph, "trace", None)
    component = graph.fuse(denoiser(nano_base, bob))
    inputs = component.example_inputs(3)
    expected = parity.outputs_of(component.module, inputs)[0]
    made = graph.build_graph(component)
    with OnnxRuntimeSession(made.to_bytes()) as session:
        found = session.run(**{name: tensor.numpy() for name, tensor in inputs.items()})["prediction"]
    assert np.abs(found - expected).max() < 1e-4 * expected.std()
    sizes = {d if isinstance(d, int) else d.value for n in made.model.graph for v in n.outputs for d in v.shape or ()}
    assert {size for size in sizes if not isinstance(size, int)} <= {"batch", None}


class Scores(nn.Module):
    def forward(self, *inputs):
        q, k = inputs
        return q @ k.transpose(2, 3)


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_number_of_tokens_of_a_reference_is_free(nano_base, tokens):
    queries = {"q": torch.zeros(2, 1, 5, 4)}
    component = Component("denoiser", Scores(), nano_base.config, ("q",), ("scores",), lambda *_: queries, None)
    traced = trace(component.module, component, {"layer.k": torch.zeros(1, 1, tokens, 4)})
    k = onnx.load_from_string(traced).graph.input[1]
    assert [axis.dim_value for axis in k.type.tensor_type.shape.dim] == [1, 1, 0, 4]  # 0: a free axis


def test_a_kept_graph_has_nothing_of_a_base_or_a_person(nano_base, nano_identity):
    component = graph.fuse(denoiser(nano_base, nano_identity))
    paths = component.module.identity_paths()
    bound = TypedComponent(component.module, "fp32", tuple(paths.values()))
    kept = graph.traced(bound.eval(), component, paths, component.module.identity_tensors(), lambda *step: None)
    assert max(np.prod(tensor.dims) for tensor in read_graph(kept).tensors) <= 32  # the frequencies of the timestep
    learned = {tensor.numpy().tobytes() for tensor in bound.state_dict().values() if tensor.numel() > 4}
    constants = onnx.load_from_string(kept).graph.initializer
    assert not learned & {onnx.numpy_helper.to_array(tensor).tobytes() for tensor in constants}
