"""Plans with small, valid graphs that need no export, and protobuf fields to change them."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from pfstorer_rt.files import sha256_bytes
from pfstorer_rt.plan import Manifest, Payload

TILE, FACTOR, CHANNELS = 64, 8, 4
SIDE = TILE // FACTOR
LATENT = ["batch", CHANNELS, "height", "width"]
TILES = ["batch", CHANNELS, SIDE, SIDE]
IMAGE = ["batch", 3, f"{FACTOR}*height", f"{FACTOR}*width"]
PORTS = {
    "encoder": ({"image": IMAGE}, {"mean": LATENT}),
    "denoiser": ({"x": TILES, "t": ["batch"], "z_lq": TILES}, {"prediction": TILES}),
    "decoder": ({"latent": LATENT}, {"image": IMAGE}),
}
"""Component -> shapes of its inputs and of its outputs."""


def _weight(*shape):
    return numpy_helper.from_array(np.full(shape, 0.01, np.float32), "w")


def graphs():
    """Return {component: ModelProto}: a convolution for encoder and decoder, a sum of all inputs for the denoiser."""
    nodes = {
        "encoder": [helper.make_node("Conv", ["image", "w"], ["mean"], strides=[FACTOR, FACTOR])],
        "denoiser": [
            helper.make_node("Unsqueeze", ["t", "axes"], ["times"]),
            helper.make_node("Sum", ["x", "z_lq", "times"], ["prediction"]),
        ],
        "decoder": [
            helper.make_node("Conv", ["latent", "w"], ["pixels"]),
            helper.make_node("DepthToSpace", ["pixels"], ["image"], blocksize=FACTOR),
        ],
    }
    kernels = {
        "encoder": [_weight(CHANNELS, 3, FACTOR, FACTOR)],
        "denoiser": [numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes")],
        "decoder": [_weight(3 * FACTOR * FACTOR, CHANNELS, 1, 1)],
    }
    made = {}
    for name, (inputs, outputs) in PORTS.items():
        ports = [
            [helper.make_tensor_value_info(port, TensorProto.FLOAT, shape) for port, shape in group.items()]
            for group in (inputs, outputs)
        ]
        graph = helper.make_graph(nodes[name], name, *ports, kernels.get(name, []))
        made[name] = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return made


def field(number, content):
    """Return a length-delimited field of a protobuf message."""
    size, digits = len(content), []
    while size > 0x7F:
        digits.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *digits, size]) + content


def small_payloads():
    """Return {component: bytes of its graph}."""
    return {name: model.SerializeToString() for name, model in graphs().items()}


def small_manifest(payloads, **changes):
    """Return the manifest of a plan with these payloads. changes: other values of its fields."""

    def described(shapes):
        return {name: {"shape": shape, "type": "float32"} for name, shape in shapes.items()}

    entries = {
        c: Payload(f"{c}.onnx", sha256_bytes(data), *map(described, PORTS[c]), {"relative": 1e-6})
        for c, data in payloads.items()
    }
    values = {
        "target": "onnx",
        "precision": "fp32",
        "tile": TILE,
        "factor": FACTOR,
        "latent_channels": CHANNELS,
        "prediction_type": "epsilon",
        "sampler": "ddpm",
        "steps": 4,
        "base_name": "nano",
        "base_fingerprint": "0" * 64,
        "tools": {"torch": "2"},
        "payloads": entries,
    }
    return Manifest(**{**values, **changes})
