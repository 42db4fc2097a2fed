"""Measure the share of the memory bandwidth that the feed-forward's gate (GEGLU) reaches.

    python benchmarks/geglu.py -o benchmarks/results/geglu.csv [--dtype fp16|bf16]

Needs an NVIDIA GPU. Shapes come from the UNet's levels on 512-pixel tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import torch
from pfstorer_rt.kernels.geglu import geglu
from roofline import DTYPES, Case, measure, need_gpu

from pfstorer_rt import ops as door

LEVELS = ((4096, 320), (1024, 640), (256, 1280))  # tokens, channels
BATCHES = (1, 4, 16)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, channels in LEVELS:
        for batch in BATCHES:
            x = torch.randn(batch, tokens, 8 * channels, dtype=dtype)
            ways = {
                "triton": partial(geglu, x),
                "torch": partial(door.geglu, x),
                "torch compiled": partial(torch.compile(door.geglu), x),
            }
            count = x.numel() // 2
            yield Case({"batch": batch, "tokens": tokens, "channels": channels}, 10.0 * count, 2 * 3 * count, ways)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
@torch.no_grad()
def main(output: Path, dtype: str) -> None:
    need_gpu()
    measure("geglu", cases(DTYPES[dtype]), output)


if __name__ == "__main__":
    main()
