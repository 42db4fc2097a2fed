import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pfstorer_rt.onnx_message import Port, Tensor, count_operators, read_graph


def external(location, name="w"):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def ports(*names):
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in names]


def model(nodes, initializers=(), **more):
    graph = helper.make_graph(nodes, "g", ports("x"), ports("y"), list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **more)


ADD = helper.make_node("Add", ["x", "w"], ["y"])


def in_initializer(tensor):
    return model([ADD], [tensor])


def in_constant(tensor):
    return model([helper.make_node("Constant", [], ["w"], value=tensor), ADD])


def in_branch(tensor):
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "b", [], ports("z"), [tensor])
    return model([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)])


def in_function(tensor):
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), ADD]
    opsets = [helper.make_opsetid("", 20)]
    return model([ADD], functions=[helper.make_function("d", "f", ["x"], ["y"], nodes, opsets)])


def in_sparse(tensor):
    made = model([ADD])
    sparse = made.graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor)
    return made


def in_training(tensor):
    made = model([ADD])
    made.training_info.add().initialization.CopyFrom(helper.make_graph([], "t", [], [], [tensor]))
    return made


@pytest.mark.parametrize("place", [in_initializer, in_constant])
def test_the_file_of_an_external_tensor_is_found(place):
    found = read_graph(place(external("a/../b")).SerializeToString()).tensors
    stored = {"location": "a/../b", "offset": "0", "length": "16"}
    assert found == [Tensor("w", "float32", (4,), found[0].inside, stored)]


def test_a_constant_inside_the_message_has_no_file():
    weights = onnx.numpy_helper.from_array(np.zeros((2, 3), np.int64), "w")
    (found,) = read_graph(model([ADD], [weights]).SerializeToString()).tensors
    assert (found.type, found.dims, found.external) == ("int64", (2, 3), None) and found.inside >= 48


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (in_branch, "subgraphs"),
        (in_function, "functions"),
        (in_sparse, "sparse tensors"),
        (in_training, "training"),
    ],
)
def test_other_parts_of_a_model_are_named(place, other):
    assert read_graph(place(external("secret.bin")).SerializeToString()).others == {other}


def test_inputs_outputs_and_operator_sets_are_read():
    info = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 3, "8*height"])
    graph = helper.make_graph([ADD], "g", ports("x"), [info])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("evil", 1)]
    found = read_graph(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    assert found.inputs == [Port("x", "float32", (4,))]
    assert found.outputs == [Port("y", "float16", ("batch", 3, "8*height"))]
    assert found.opsets == [("", 23), ("evil", 1)] and found.others == set()


def test_operators_of_the_main_graph_are_counted():
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "b", [], ports("z"))
    nodes = [ADD, helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch), ADD]
    assert count_operators(model(nodes).SerializeToString()) == {"Add": 2, "If": 1}


@pytest.mark.parametrize("bad", [b"not protobuf", b"\x3a", b"\x3a\xff\x01x", b"\xff" * 20, b"\x3a\x02\x0b\x00"])
def test_other_bytes_are_refused(bad):
    with pytest.raises(ValueError, match="protobuf"):
        read_graph(bad)
    with pytest.raises(ValueError, match="protobuf"):
        count_operators(bad)
