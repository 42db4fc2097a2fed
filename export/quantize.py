"""int8: convolutions and matrix products in 8 bits, with activation ranges measured on photographs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from skimage import data

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.models.components import Component

from .parity import photograph, portrait, resize

SAMPLES = 20
LARGEST_SQUARE = 256
"""Largest side of the squares for encoder and decoder, whose activations at full size need gigabytes."""
TIMESTEPS = (999.0, 749.0, 499.0, 249.0, 0.0)
"""Timesteps for the denoiser's ranges, used in turn, from pure noise to an almost clean latent."""
OPERATORS = ["Conv", "MatMul", "Gemm"]
"""Operators in 8 bits. Norms, attention and gates keep their precision."""


def calibration_tiles(tile: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (LQ, HQ) tiles (1, 3, tile, tile) in [-1, 1], crops of public-domain photographs from scikit-image.

    Every other LQ tile is downsampled by a factor of 2 to 4 and noisy; the others equal the HQ tile.
    """
    generator = torch.Generator().manual_seed(0)
    photos = [portrait(), data.chelsea(), data.coffee(), data.rocket()]
    for i in range(SAMPLES):
        photo = photograph(photos[i % len(photos)])
        side = int(min(photo.shape[-2:]) * (0.5 + 0.5 * float(torch.rand((), generator=generator))))
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in photo.shape[-2:])
        hq = resize(photo[..., top : top + side, left : left + side], tile)
        lq = hq
        if i % 2:
            lq = resize(resize(hq, tile // (2 + i % 3)), tile)
            lq = lq + 0.1 * torch.randn(lq.shape, generator=generator)
        yield lq.clamp(-1, 1), hq.clamp(-1, 1)


def calibration_inputs(component: Component) -> Iterator[dict[str, HostArray]]:
    """Yield a component's inputs for `calibration_tiles`, one row at a time."""
    generator = torch.Generator().manual_seed(1)
    side = component.config.tile if component.every_step else min(component.config.tile, LARGEST_SQUARE)
    for i, (lq, hq) in enumerate(calibration_tiles(side)):
        t = torch.tensor([TIMESTEPS[i // 2 % len(TIMESTEPS)]])
        yield {name: tensor.numpy() for name, tensor in component.inputs_of(lq, hq, t, generator).items()}


def quantize(model: Path, inputs: Iterator[dict[str, HostArray]], output: Path) -> Path:
    """Quantize the `OPERATORS` of an fp32 graph with QuantizeLinear and DequantizeLinear; returns `output`.

    The constants are written to a file beside `output`. Activations have 8 unsigned bits; inputs: calibration inputs
    for their ranges, which exclude the outermost 1e-5 of the values. Weights have 7 signed bits and a scale for each
    output channel, because processors without VNNI (Intel before 2019, AMD before Zen 4) add two products in 16 bits,
    and two products of 8 by 8 bits can overflow.
    """
    from onnxruntime import quantization

    with _quiet():
        ranges = measure_ranges(model, inputs)  # before the weights are loaded, to save gigabytes
        quantizer = quantization.QDQQuantizer(
            quantization.quant_utils.load_model_with_shape_infer(model),
            per_channel=True,
            reduce_range=True,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=OPERATORS,
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(output), True)
    return output


def measure_ranges(model: Path, inputs: Iterator[dict[str, HostArray]]) -> Any:
    """Return the ranges of a graph's activations.

    ONNX Runtime's calibrator keeps three copies of the weights and the activations of all inputs in memory. Here the
    weights stay in their file, and only the activations of one input are in memory.
    """
    from onnxruntime.quantization import CalibrationMethod, TensorsData, calibrate

    watched = model.with_name("watched.onnx")
    collector = calibrate.HistogramCollector("percentile", True, 2048, 2048, 99.999, "same")
    onnx.save(with_activations_as_outputs(onnx.load(model, load_external_data=False)), watched)
    with OnnxRuntimeSession(watched) as session:
        for one in inputs:
            collector.collect({name: [array] for name, array in session.run(**one).items()})
    watched.unlink()
    return TensorsData(CalibrationMethod.Percentile, collector.compute_collection_result())


def with_activations_as_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the outputs of a graph by the inputs and outputs of its `OPERATORS`."""
    constants = {tensor.name for tensor in model.graph.initializer}
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output, *model.graph.input)}
    names = dict.fromkeys(
        name for node in model.graph.node if node.op_type in OPERATORS for name in (*node.input, *node.output)
    )
    del model.graph.output[:]
    model.graph.output.extend(known[name] for name in names if name not in constants)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress output of the calibration."""
    logger: Any = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), np.errstate(divide="ignore", invalid="ignore"):
            yield
    finally:
        logger.setLevel(level)
