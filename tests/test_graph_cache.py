"""The cache of exported graphs that the tests use."""

from types import SimpleNamespace

import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper
from pfstorer_rt.export.graph import fuse
from torch import nn

from pfstorer_rt.models.base import build_base
from pfstorer_rt.models.components import components


class Layer(nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), 3.0
        nn.init.constant_(self.linear.weight, weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


@pytest.fixture
def cache(kept_graphs, tmp_path):
    """`open(files=None)` returns a cache in one folder; `exported` lists the modules that its exporter was given."""
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])] for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    model = onnx_ir.from_proto(helper.make_model(helper.make_graph([node], "g", *ports)))
    exported = []

    def export(module, arguments, **options):
        exported.append(module)
        return SimpleNamespace(model=model)

    return SimpleNamespace(
        open=lambda files=None: kept_graphs.GraphCache(tmp_path / "graphs", export, files), exported=exported
    )


def test_a_graph_is_exported_once_and_read_afterwards(cache):
    x = torch.ones(1, 2)
    made = cache.open()(Layer(), (x,), opset_version=23)
    read = cache.open()(Layer(), (x,), opset_version=23)
    assert len(cache.exported) == 1
    assert [node.op_type for node in read.model.graph] == [node.op_type for node in made.model.graph] == ["Identity"]


def changed(change):
    layer = Layer()
    change(layer)
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.linear.weight.data.mul_(2),
        lambda layer: layer.hidden.add_(1),
        lambda layer: setattr(layer, "scale", 4.0),
        lambda layer: setattr(layer, "extra", nn.Identity()),
        lambda layer: layer.half(),
    ],
)
def test_another_module_is_exported(cache, change):
    for module in (Layer(), changed(change)):
        cache.open()(module, (torch.ones(1, 2),))
    assert len(cache.exported) == 2


def test_other_inputs_options_and_sources_are_exported(cache, tmp_path):
    cache.open()(Layer(), (torch.ones(1, 2),))
    cache.open()(Layer(), (torch.ones(2, 2),))
    cache.open()(Layer(), (torch.ones(1, 2),), opset_version=20)
    source = tmp_path / "source.py"
    for text in ("a = 1", "a = 2"):
        source.write_text(text)
        cache.open([source])(Layer(), (torch.ones(1, 2),))
    assert len(cache.exported) == 5


def test_a_module_that_cannot_be_pickled_is_exported_each_time(cache):
    for _ in range(2):
        cache.open()(changed(lambda layer: setattr(layer, "hook", lambda: 1)), ())
    assert len(cache.exported) == 2


def test_networks_of_equal_weights_have_one_fingerprint(kept_graphs):
    first, same, other = (
        [fuse(component).module for component in components(build_base("nano", seed)).values()] for seed in (0, 0, 1)
    )
    prints = [[kept_graphs.fingerprint(module) for module in modules] for modules in (first, same, other)]
    assert prints[0] == prints[1] and not set(prints[0]) & set(prints[2])
