"""Read facts from a serialized ONNX model without the onnx package and without loading the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# Field numbers are those of onnx.proto of ONNX 1.18 (IR version 11).
_GRAPH, _OPSET, _TRAINING, _FUNCTION = 7, 8, 20, 25
_FIXED = {1: 8, 5: 4}
"""Wire type -> bytes of a value (protobuf encoding)."""
_MOST = 100_000
"""Largest number of nodes, tensors, inputs and outputs. Stable Diffusion 2.1 has about 6000 nodes."""
TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
"""Data type of ONNX -> name in numpy, for the types that occur in plans."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    name: str
    type: str
    shape: tuple[int | str, ...]
    """Sizes of fixed dimensions, names of free ones."""


@dataclass(frozen=True)
class Tensor:
    """A constant of a graph."""

    name: str
    type: str
    dims: tuple[int, ...]
    inside: int
    """Bytes of the constant in the message. They include its name."""
    external: dict[str, str] | None
    """`location`, `offset` and `length` of data in another file; None if the data is in the message."""


@dataclass
class GraphFacts:
    """The main graph of a model, and parts of the model that are not in its main graph."""

    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(domain, operator) -> number of nodes, without subgraphs."""
    opsets: list[tuple[str, int]] = field(default_factory=list)
    """(domain, version) of the imported operator sets."""
    others: set[str] = field(default_factory=set)
    """Kinds of further parts: `subgraphs`, `functions`, `training`, `sparse tensors`, `several graphs`."""


def read_graph(model: bytes) -> GraphFacts:
    """Read the facts of a serialized ModelProto. Subgraphs are named in `others` and are not read.

    Raises `ValueError` for bytes that are not a protobuf message, for a message without a graph, and for more nodes or
    tensors than a plan has.
    """
    facts, graphs = GraphFacts(), 0
    for number, value in _fields(memoryview(model)):
        if number == _OPSET:
            facts.opsets.append((_text(value, 1), _integer(value, 2)))
        elif number == _GRAPH:
            graphs += 1
            _read_graph(value, facts)
        elif number in (_TRAINING, _FUNCTION):
            facts.others.add("training" if number == _TRAINING else "functions")
    if not graphs:
        raise ValueError("no graph in a protobuf message")
    if graphs > 1:
        facts.others.add("several graphs")
    return facts


def _read_graph(graph: memoryview, facts: GraphFacts) -> None:
    parts = 0
    for number, value in _fields(graph):
        parts += number in (1, 5, 11, 12)
        if parts > _MOST:
            raise ValueError(f"more than {_MOST} nodes and tensors in an ONNX message")
        if number == 1:
            _read_node(value, facts)
        elif number == 5:
            facts.tensors.append(_tensor(value))
        elif number in (11, 12):
            (facts.inputs if number == 11 else facts.outputs).append(_port(value))
        elif number == 15:
            facts.others.add("sparse tensors")


def _read_node(node: memoryview, facts: GraphFacts) -> None:
    domain = operator = ""
    for number, value in _fields(node):
        if number == 4:
            operator = _decoded(value)
        elif number == 7:
            domain = _decoded(value)
        elif number == 5:
            for kind, part in _fields(value):
                if kind in (5, 10):
                    facts.tensors.append(_tensor(part))
                elif kind in (6, 11):
                    facts.others.add("subgraphs")
                elif kind in (22, 23):
                    facts.others.add("sparse tensors")
    facts.operators[domain, operator] += 1


def _tensor(message: memoryview) -> Tensor:
    dims: list[int] = []
    name, kind, place = "", 0, 0
    external: dict[str, str] = {}
    for number, value in _values(message):
        if number == 1:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif isinstance(value, int):
            kind, place = (value if number == 2 else kind), (value if number == 14 else place)
        elif number == 8:
            name = _decoded(value)
        elif number == 13:
            external[_text(value, 1)] = _text(value, 2)
    stored = external if external or place else None
    return Tensor(name, TYPES.get(kind, f"type {kind}"), tuple(dims), len(message), stored)


def _packed(message: memoryview) -> list[int]:
    values, position = [], 0
    while position < len(message):
        value, position = _varint(message, position)
        values.append(value)
    return values


def _port(message: memoryview) -> Port:
    name, kind, shape = "", "no tensor", None
    for number, value in _fields(message):
        if number == 1:
            name = _decoded(value)
        elif number == 2:
            for tensor in (part for form, part in _fields(value) if form == 1):
                kind = TYPES.get(code := _integer(tensor, 1), f"type {code}")
                shape = [part for form, part in _fields(tensor) if form == 2]
    dims = [_dimension(dim) for part in shape or [] for number, dim in _fields(part) if number == 1]
    return Port(name, kind, tuple(dims))


def _dimension(message: memoryview) -> int | str:
    return _text(message, 2) or _integer(message, 1)


def count_operators(model: bytes) -> Counter[str]:
    """Return {operator: number of nodes} of the main graph of a serialized ModelProto, without subgraphs.

    Raises `ValueError` for bytes that are not a protobuf message.
    """
    return Counter({name: count for (_, name), count in read_graph(model).operators.items()})


def _decoded(value: memoryview) -> str:
    return str(value, "utf-8", "replace")


def _text(message: memoryview, wanted: int) -> str:
    """Return the last string of a field, or an empty string."""
    found = [value for number, value in _fields(message) if number == wanted]
    return _decoded(found[-1]) if found else ""


def _integer(message: memoryview, wanted: int) -> int:
    """Return the last integer of a field, or 0."""
    found = [value for number, value in _values(message) if number == wanted and isinstance(value, int)]
    return found[-1] if found else 0


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (number, content) of the length-delimited fields of a message."""
    for number, value in _values(message):
        if not isinstance(value, int):
            yield number, value


def _values(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, integer or content) of all fields of a message, except for numbers of a fixed size."""
    position, end = 0, len(message)
    while position < end:
        tag = message[position]  # nearly all integers have one byte: a call for each would take half of the time
        position += 1
        if tag > 0x7F:
            tag, position = _varint(message, position - 1)
        wire = tag & 7
        if wire in _FIXED:
            value, size = 0, _FIXED[wire]
        elif wire in (0, 2):
            value = message[position] if position < end else 0x80
            position += 1
            if value > 0x7F:
                value, position = _varint(message, position - 1)
            size = value if wire == 2 else 0
        else:
            raise ValueError(f"wire type {wire} in a protobuf message")
        if position + size > end:
            raise ValueError("a field is longer than its protobuf message")
        if wire == 0:
            yield tag >> 3, value
        elif wire == 2:
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
