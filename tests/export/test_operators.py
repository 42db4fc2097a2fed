"""Every operator of the exporter is one that the check of a plan's graphs accepts."""

import pytest
from pfstorer_rt.export.graph import build_graph, fuse

from pfstorer_rt.graph_check import OPERATORS
from pfstorer_rt.models.components import components
from pfstorer_rt.onnx_message import read_graph
from pfstorer_rt.plan import COMPONENTS


def refused(graph):
    """The operators of a serialized graph that the check refuses, and its parts outside the main graph."""
    facts = read_graph(graph)
    return [name for domain, name in facts.operators if domain or name not in OPERATORS], facts.others


# test_cfw.py reads plans of a variational autoencoder and of feature wrapping, whose operators are checked there.
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_operators_of_onnx_plans_are_accepted(precision, exported_once, nano_identity):
    plan = exported_once(nano_identity, precision=precision)
    assert [refused(plan.read(component)) for component in COMPONENTS] == [([], set())] * 3


@pytest.mark.parametrize("component", COMPONENTS)
def test_operators_of_graphs_for_tensorrt_are_accepted(component, nano_base, nano_identity):
    """In fp32 the engines get attention as matrix products; in fp16 they get the graph of an ONNX plan."""
    made = build_graph(fuse(components(nano_base, nano_identity)[component]), fused_attention=False)
    assert refused(made.to_bytes()) == ([], set())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_group_norms_of_an_onnx_plan_have_a_kernel_in_onnx_runtime(precision, exported_once, nano_identity):
    """ONNX Runtime replaces a GroupNormalization by 20 operators whenever it loads the graph."""
    operators = read_graph(exported_once(nano_identity, precision=precision).read("denoiser")).operators
    assert not operators["", "GroupNormalization"] and operators["", "InstanceNormalization"]


def test_group_norms_of_a_graph_for_tensorrt_stay_one_operator(nano_base, nano_identity):
    operators = read_graph(build_graph(fuse(components(nano_base, nano_identity)["denoiser"])).to_bytes()).operators
    assert operators["", "GroupNormalization"] and not operators["", "InstanceNormalization"]
