"""Read facts from a serialized ONNX model without the onnx package and without loading the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

# Message -> field number -> message, for fields on the path to a tensor (onnx.proto of ONNX 1.18, IR version 11).
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_FIXED = {1: 8, 5: 4}
"""Wire type -> bytes of a value (protobuf encoding)."""


def external_files(model: bytes) -> set[str]:
    """Return the names of all external data files of a serialized ModelProto.

    An engine opens these files by name, so an untrusted plan could make it read any file in the working directory.
    Raises `ValueError` for bytes that are not a protobuf message.
    """
    found: set[str] = set()
    pending = [("Model", memoryview(model))]
    while pending:
        kind, message = pending.pop()
        if kind == "Entry":
            entry = {number: bytes(value) for number, value in _fields(message)}
            if entry.get(1) == b"location":
                found.add(entry.get(2, b"").decode("utf-8", "replace"))
            continue
        children = _FIELDS[kind]
        pending.extend((children[number], value) for number, value in _fields(message) if number in children)
    return found


def count_operators(model: bytes) -> Counter[str]:
    """Return {operator: number of nodes} of the main graph of a serialized ModelProto, without subgraphs.

    Raises `ValueError` for bytes that are not a protobuf message.
    """
    graphs = (graph for number, graph in _fields(memoryview(model)) if number == 7)
    nodes = (node for graph in graphs for number, node in _fields(graph) if number == 1)
    return Counter(str(name, "utf-8", "replace") for node in nodes for number, name in _fields(node) if number == 4)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (number, content) of the length-delimited fields of a message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == 0:
            _, position = _varint(message, position)
            continue
        if wire == 2:
            size, position = _varint(message, position)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} in a protobuf message")
        if position + size > len(message):
            raise ValueError("a field is longer than its protobuf message")
        if wire == 2:
            yield tag >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Read a base-128 integer; returns (value, next position)."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("a protobuf message is cut off")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("an integer of a protobuf message is too long")
