import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pfstorer_rt.onnx_message import count_operators, external_files


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


PLACES = [in_initializer, in_constant, in_branch, in_function, in_sparse, in_training]


@pytest.mark.parametrize("place", PLACES)
def test_every_file_of_external_tensors_is_found(place):
    assert external_files(place(external("secret.bin")).SerializeToString()) == {"secret.bin"}


def test_a_self_contained_model_reads_no_file():
    weights = onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    assert external_files(model([ADD], [weights]).SerializeToString()) == set()


def test_several_files_and_strange_names():
    tensors = [external("a/../b", "v"), external("ü\n", "w")]
    assert external_files(model([ADD], tensors).SerializeToString()) == {"a/../b", "ü\n"}


def test_operators_of_the_main_graph_are_counted():
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "b", [], ports("z"))
    nodes = [ADD, helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch), ADD]
    assert count_operators(model(nodes).SerializeToString()) == {"Add": 2, "If": 1}


@pytest.mark.parametrize("bad", [b"not protobuf", b"\x3a", b"\x3a\xff\x01x", b"\xff" * 20, b"\x3a\x02\x0b\x00"])
def test_other_bytes_are_refused(bad):
    with pytest.raises(ValueError, match="protobuf"):
        external_files(bad)
    with pytest.raises(ValueError, match="protobuf"):
        count_operators(bad)
