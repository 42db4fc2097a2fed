"""Measure the share of the memory bandwidth that GroupNorm with SPADE modulation, and with SiLU, reaches.

    python benchmarks/spade_norm.py -o benchmarks/results/spade_norm.csv [--dtype fp16|bf16]

Needs an NVIDIA GPU. The shapes come from the UNet's levels on 512-pixel tiles and from the decoder, in both memory
layouts. The bytes include each map once, although the statistics read x a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import torch
from pfstorer_rt.kernels import spade_norm as kernel
from roofline import DTYPES, Case, measure, need_gpu
from torch import nn

from pfstorer_rt import ops as door

MAPS = ((320, 64), (640, 32), (1280, 16), (128, 512))  # channels, side
FORMATS = {"channels-last": torch.channels_last, "channels-first": torch.contiguous_format}
BATCHES = (1, 4, 16)


def cases(dtype: torch.dtype, modulated: bool) -> Iterator[Case]:
    for channels, side in MAPS:
        for batch in BATCHES if side <= 64 else BATCHES[:1]:
            for layout, memory_format in FORMATS.items():
                norm = nn.GroupNorm(32, channels, dtype=dtype)
                maps = [
                    torch.randn(batch, channels, side, side, dtype=dtype).to(memory_format=memory_format)
                    for _ in range(3)
                ]
                arguments = maps if modulated else [maps[0], None, None]
                weights = norm.weight, norm.bias, norm.num_groups, norm.eps
                ways = {
                    "triton": partial(kernel.spade_norm, maps[0], *weights, *arguments[1:], not modulated),
                    "torch": partial(door.spade_norm, norm, *arguments, not modulated),
                    "torch compiled": partial(torch.compile(door.spade_norm), norm, *arguments, not modulated),
                }
                count = maps[0].numel()
                shape = {"batch": batch, "channels": channels, "side": side, "layout": layout, "modulated": modulated}
                yield Case(shape, 10.0 * count, 2 * count * (4 if modulated else 2), ways)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
@torch.no_grad()
def main(output: Path, dtype: str) -> None:
    need_gpu()
    for modulated in (True, False):
        measure("spade_norm", cases(DTYPES[dtype], modulated), output)


if __name__ == "__main__":
    main()
