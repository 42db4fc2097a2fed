"""Train the network that removes scratches (`restore --remove-scratches`), and write it as an ONNX file.

    python benchmarks/train_scratches.py FOLDER=0.6 FOLDER=0.4 --work WORK --minutes 40 \
        -o pfstorer_rt/runtime/scratches.onnx

Tiles of 512 pixels are composed of the photographs, and two degraded versions are made of each one. The training draws
synthetic damage on crops of all three. WORK has the tiles, the losses (CSV) and the checkpoint; the same command
resumes an interrupted training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from pfstorer_rt.config import changed
from pfstorer_rt.files import atomic_write
from pfstorer_rt.models.scratches import MULTIPLE, ScratchGraph, ScratchNetwork
from pfstorer_rt.training.scratches import ScratchConfig, train_scratches
from pfstorer_rt.training.tile_pool import PoolConfig, make_pool, parse_source


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="FOLDER[=WEIGHT]...")
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--tiles", default=1800, show_default=True, help="Tiles composed of the photographs.")
@click.option("--minutes", type=float, help="Duration of the training, instead of --iterations.")
@click.option("--iterations", type=int)
@click.option("--start", type=click.Path(exists=True, path_type=Path), help="Checkpoint whose weights are continued.")
@click.option("--crop", type=int, help="Side of the crops in pixels. [default: 256]")
@click.option("--undamaged", type=float, help="Share of the crops without damage. [default: 0.25]")
@click.option("--damaged-weight", type=float, help="Weight of a damaged pixel in the cross-entropy. [default: 2]")
@click.option("--workers", default=1, show_default=True, help="Processes that compose tiles.")
def main(
    photos: tuple[str, ...],
    work: Path,
    output: Path,
    tiles: int,
    minutes: float | None,
    iterations: int | None,
    start: Path | None,
    crop: int | None,
    undamaged: float | None,
    damaged_weight: float | None,
    workers: int,
) -> None:
    config = changed(ScratchConfig(), crop=crop, undamaged=undamaged, damaged_weight=damaged_weight)
    config = replace(config, train=changed(config.train, minutes=minutes, iterations=iterations))
    pool = make_pool([parse_source(text) for text in photos], PoolConfig(tiles, versions=2), work / "pool", workers)
    versions = [pool["lq"][:, i] for i in range(pool["lq"].shape[1])]
    save_network(train_scratches([pool["hq"], *versions], work, config, start), output)


def save_network(network: ScratchNetwork, path: Path) -> None:
    """Write the network as ONNX: input `image` (1, 3, H, W), outputs `opacity` and `fill`; weights in fp16."""
    sides = {2: MULTIPLE * torch.export.Dim("height"), 3: MULTIPLE * torch.export.Dim("width")}
    program = torch.onnx.export(
        ScratchGraph(network).eval().float().cpu(),
        (torch.zeros(1, 3, 4 * MULTIPLE, 6 * MULTIPLE),),
        dynamic_shapes={"image": sides},
        dynamo=True,
        input_names=["image"],
        output_names=["opacity", "fill"],
        verbose=False,
    )
    assert program is not None
    model = onnx.load_from_string(program.model_proto.SerializeToString())
    halve_weights(model)
    for entry in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info, model.graph):
        entry.ClearField("metadata_props")  # the exporter's notes contain paths of this computer
        entry.ClearField("doc_string")
    with atomic_write(path) as file:
        file.write(model.SerializeToString(deterministic=True))


def halve_weights(model: onnx.ModelProto) -> None:
    """Store the weights in fp16; casts give them back to the network as fp32."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        name, half = tensor.name, f"{tensor.name}.half"
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), half))
        casts.append(helper.make_node("Cast", [half], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


if __name__ == "__main__":
    main()
