"""Check an ONNX graph of a plan against the manifest of the plan, before an engine loads the graph."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from pfstorer_rt.onnx_message import GraphFacts, Port, Tensor, read_graph

_WRITTEN = """
    Add Attention Cast Clip Concat Constant Conv Cos DepthToSpace DequantizeLinear Div Exp Expand Gelu Gemm
    GroupNormalization InstanceNormalization LayerNormalization LeakyRelu MatMul Mul Pad QuantizeLinear ReduceMean Relu
    Reshape Resize Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze
"""
_SIMILAR = """
    Abs And AveragePool BatchNormalization Ceil ConvTranspose Elu Equal Erf Flatten Floor Gather GlobalAveragePool
    Greater GreaterOrEqual HardSigmoid Identity Less LessOrEqual Log Max MaxPool Min Neg Not Or
    PRelu Pow Reciprocal ReduceMax ReduceMin ReduceSum RMSNormalization Sign Softplus SpaceToDepth Sum Where
"""
OPERATORS = frozenset([*_WRITTEN.split(), *_SIMILAR.split()])
"""Operators that an export of any target and precision writes, and similar ones that another version of PyTorch's
exporter may write. None of them runs a subgraph or reads a file."""
_OPSETS = range(18, 26)
_BYTES = {"float32": 4, "uint8": 1, "int8": 1, "int32": 4, "int64": 8, "bool": 1, "float16": 2}
_LARGEST = 1 << 34
"""Values of a constant. The largest constant of Stable Diffusion has 30 million."""
_FREE = re.compile(r"(?:(\d+)\*)?[A-Za-z_]\w*")
"""A free dimension such as `height` or `8*height`."""
_FEATURES = re.compile(r"features_([0-9])")

Ports = Mapping[str, Mapping[str, Any]]


class Described(Protocol):
    """The facts of `plan.Payload` that a graph is compared with."""

    @property
    def inputs(self) -> Ports: ...  # noqa: D102
    @property
    def outputs(self) -> Ports: ...  # noqa: D102
    @property
    def weights(self) -> str: ...  # noqa: D102


class Facts(Protocol):
    """The facts of `plan.Manifest` that a graph is compared with."""

    @property
    def tile(self) -> int: ...  # noqa: D102
    @property
    def factor(self) -> int: ...  # noqa: D102
    @property
    def latent_channels(self) -> int: ...  # noqa: D102
    @property
    def strength(self) -> bool: ...  # noqa: D102
    @property
    def cfw(self) -> bool: ...  # noqa: D102
    @property
    def payloads(self) -> Mapping[str, Described]: ...  # noqa: D102


def check_graph(model: bytes, manifest: Facts, component: str, weights: int = 0) -> None:
    """Raise `ValueError` unless an ONNX graph has exactly the form that the manifest describes.

    weights: bytes of the component's external weights.
    """
    try:
        facts = read_graph(model)
    except ValueError as error:
        raise ValueError(f"is not an ONNX graph ({error})") from error
    payload = manifest.payloads[component]
    _check_operators(facts)
    for tensor in facts.tensors:
        _check_tensor(tensor, payload.weights, weights)
    for kind, found, stated in (("input", facts.inputs, payload.inputs), ("output", facts.outputs, payload.outputs)):
        _check_stated(kind, found, stated)
        _check_expected(kind, stated, expected_ports(manifest, component)[kind == "output"])


def _check_operators(facts: GraphFacts) -> None:
    if facts.others:
        raise ValueError(f"has {', '.join(sorted(facts.others))}; expected one graph of plain operators")
    for domain, version in facts.opsets:
        if domain not in ("", "ai.onnx") or version not in _OPSETS:
            raise ValueError(
                f"needs version {version} of the operators {domain[:80]!r}; expected those of ONNX, 18 to 25"
            )
    for domain, name in facts.operators:
        if domain not in ("", "ai.onnx") or name not in OPERATORS:
            raise ValueError(f"has the operator {f'{domain}:{name}'.lstrip(':')[:80]!r}, which a plan may not have")


def _check_tensor(tensor: Tensor, file: str, size: int) -> None:
    name = tensor.name[:80]
    values = math.prod(tensor.dims)
    if tensor.type not in _BYTES:
        raise ValueError(f"has the constant {name!r} of {tensor.type}; expected {', '.join(_BYTES)}")
    if len(tensor.dims) > 8 or values > _LARGEST:
        raise ValueError(f"has the constant {name!r} with {len(tensor.dims)} dimensions and {values:.3g} values")
    if tensor.external is None:
        if values > tensor.inside:
            raise ValueError(f"has the constant {name!r} of {values} values in {tensor.inside} bytes")
        return
    location = tensor.external.get("location", "")
    if not file or location != file:
        raise ValueError(f"reads other files ({location[:80]!r}); expected {repr(file) if file else 'none'}")
    numbers = [tensor.external.get(key, "0") for key in ("offset", "length")]
    if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
        raise ValueError(f"has the constant {name!r} at {str(numbers)[:80]}; expected offset and length in bytes")
    offset, length = map(int, numbers)
    if length != values * _BYTES[tensor.type] or offset + length > size:
        raise ValueError(f"has the constant {name!r} at bytes {offset} to {offset + length} of {size} bytes of weights")


def _check_stated(kind: str, found: list[Port], stated: Ports) -> None:
    """Compare the inputs or outputs of a graph with the manifest's."""
    names = [port.name for port in found]
    if sorted(names) != sorted(stated):
        raise ValueError(f"has the {kind}s {_listed(names)}; the manifest names {_listed(stated)}")
    for port in found:
        shape, dtype = tuple(stated[port.name]["shape"]), stated[port.name]["type"]
        if (port.shape, port.type) != (shape, dtype):
            raise ValueError(
                f"has the {kind} {port.name[:80]!r} of {port.type} {_listed(port.shape)}; "
                f"the manifest names {dtype} {_listed(shape)}"
            )


def _listed(values: Iterable[object]) -> str:
    return str(list(values))[:160]


def expected_ports(m: Facts, component: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the needed inputs and outputs of a component: {name: dimensions}.

    Dimensions are numbers, `batch`, and height and width as a multiple of the latent's, such as `8*height`.
    """
    latent, side = f"batch {m.latent_channels} 1*height 1*width", m.tile // m.factor
    image = f"batch 3 {m.factor}*height {m.factor}*width"
    tile = f"batch {m.latent_channels} {side} {side}"
    if component == "denoiser":
        return {"x": tile, "t": "batch", "z_lq": tile} | ({"strength": "1"} if m.strength else {}), {"prediction": tile}
    shared = _features(m)
    if component == "encoder":
        std = {"std": latent} if "std" in m.payloads["encoder"].outputs else {}
        return {"image": image}, {"mean": latent, **std, **shared}
    return {"latent": latent, **shared, **({"cfw_weight": "1"} if m.cfw else {})}, {"image": image}


def _features(m: Facts) -> dict[str, str]:
    """Return the features that the encoder passes to the decoder, as the encoder's outputs name them."""
    found: dict[str, str] = {}
    for name, port in m.payloads["encoder"].outputs.items():
        if m.cfw and (match := _FEATURES.fullmatch(name)) and len(port["shape"]) == 4:
            times = m.factor // 2 ** int(match[1])
            found[name] = f"batch {port['shape'][1]} {times}*height {times}*width"
    return found


def _check_expected(kind: str, stated: Ports, expected: Mapping[str, str]) -> None:
    """Compare the inputs or outputs of a manifest with the component's."""
    if sorted(stated) != sorted(expected):
        raise ValueError(f"has the {kind}s {_listed(stated)}; expected {_listed(expected)}")
    for name, dimensions in expected.items():
        wanted, shape = dimensions.split(), stated[name]["shape"]
        fits = len(shape) == len(wanted) and all(map(_fits, shape, wanted))
        if not fits or stated[name]["type"] != "float32":
            raise ValueError(
                f"has the {kind} {name!r} of {stated[name]['type']} {_listed(shape)}; "
                f"expected float32 {_listed(wanted)}"
            )


def _fits(dimension: int | str, wanted: str) -> bool:
    """Whether a dimension is the wanted number, or free and the wanted multiple."""
    if wanted.isdigit() or isinstance(dimension, int):
        return str(dimension) == wanted
    match = _FREE.fullmatch(dimension)
    return match is not None and (match[1] or "1") == (wanted.partition("*")[0] if "*" in wanted else "1")
