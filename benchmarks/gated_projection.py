"""Time the fused gated projection, alone and in a whole personalization block.

    python benchmarks/gated_projection.py -o benchmarks/results/gated_projection.csv [--dtype fp16|bf16]

Needs an NVIDIA GPU. Measures the last projections of the personalization blocks of a Stable Diffusion 2.1 base on
512-pixel tiles, and whole blocks with a reference of equal length. Methods: the kernel (each block size; the block with
`attention="triton"`), the layer with element-wise operations, and both compiled; for blocks also SDPA and xformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from pfstorer_rt.kernels.gated_projection import TILES, gated_projection
from roofline import DTYPES, Case, measure, need_gpu
from torch import nn

from pfstorer_rt import ops as door
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.models.personalization import PersonalizationBlock

LEVELS = ((4096, 320), (1024, 640), (256, 1280))  # tokens, channels
BATCHES = (1, 4, 16)


def projections(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, channels in LEVELS:
        for batch in BATCHES:
            layer = nn.Linear(4 * channels, channels, dtype=dtype)
            h = torch.randn(batch, tokens, 4 * channels, dtype=dtype)
            x, stream = (torch.randn(batch, tokens, channels, dtype=dtype) for _ in range(2))
            gamma, strength = torch.randn(channels, dtype=dtype), torch.ones(1)
            plain = partial(door.gated_projection, h, layer, stream, x, gamma, strength)
            compiled = partial(torch.compile(door.gated_projection), h, layer, stream, x, gamma, strength)
            arguments = h, layer.weight, layer.bias, stream, x, gamma, strength
            ways: dict[str, Callable[[], Any]]
            ways = {f"triton {tile}": partial(gated_projection, *arguments, tile) for tile in TILES}
            ways |= {"layer and passes": plain, "layer and passes, compiled": compiled}
            rows = batch * tokens
            operations = 2 * rows * 4 * channels * channels
            moved = 2 * (rows * (4 + 3) * channels + 4 * channels * channels)
            yield Case({"batch": batch, "tokens": tokens, "channels": channels}, operations, moved, ways)


def blocks(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, channels in LEVELS:
        for batch in BATCHES:
            block = PersonalizationBlock(channels, 64).to(dtype)
            nn.init.normal_(block.gamma)
            x, reference = (torch.randn(batch, tokens, channels, dtype=dtype) for _ in range(2))
            ways: dict[str, Callable[[], Any]] = {}
            for name in ("triton", "sdpa", "xformers"):
                try:
                    kernels = door.choose(name, x.device, 64).kernels
                except MissingBackendError as error:
                    click.echo(f"{name}: {error}")
                    continue
                ways[f"block, {name}"] = partial(with_kernels, block, kernels, x, reference)
            ways["block, sdpa, compiled"] = partial(with_kernels, torch.compile(block), door.Kernels(), x, reference)
            n = batch * tokens * channels
            # Two sets of query, key, value and output projections, the feed-forward (8 + 4), and two attentions.
            operations = 2 * n * channels * (8 + 12) + 2 * 4 * n * tokens
            moved = 2 * (3 * n + channels * channels * (8 + 12))
            yield Case({"block": channels, "batch": batch, "tokens": tokens}, operations, moved, ways)


def with_kernels(block: Any, kernels: door.Kernels, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    if block.kernels is not kernels:
        block.set_kernels(kernels)
    return block(x, reference)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
@torch.no_grad()
def main(output: Path, dtype: str) -> None:
    need_gpu()
    measure("gated_projection", projections(DTYPES[dtype]), output)
    measure("gated_projection", blocks(DTYPES[dtype]), output)


if __name__ == "__main__":
    main()
