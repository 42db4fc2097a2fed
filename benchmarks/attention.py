"""Time the Triton attention kernel, forward and backward, against PyTorch's attention and xformers.

    python benchmarks/attention.py -o benchmarks/results/attention.csv [--dtype fp16|bf16]

Needs an NVIDIA GPU. Sequence lengths are the UNet's on 512-pixel tiles (4096, 1024, 256). The keys are the sequence, a
prompt (77 tokens), or a reference with three quarters of its tokens. Methods: the kernel with its
fastest block size on this GPU, each backend of SDPA, compiled SDPA, and xformers. For masked keys SDPA gets a mask; the
kernel skips the masked keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from pfstorer_rt.kernels.attention import FORWARD_TILES, attention, compact
from pfstorer_rt.kernels.tuning import bucket
from roofline import DTYPES, Case, measure, milliseconds, need_gpu, xformers_or_none
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LENGTHS = ((4096, 4096), (1024, 1024), (256, 256), (4096, 77), (1024, 77), (4096, 3072))
BATCHES = (1, 4, 16)


def sdpa(backend: SDPBackend | None, *tensors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask)


def xformers(ops: Any, *tensors: torch.Tensor) -> torch.Tensor:
    return ops.memory_efficient_attention(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)


def back(way: Callable[[], torch.Tensor], tensors: tuple[torch.Tensor, ...], grad: torch.Tensor) -> Any:
    return torch.autograd.grad(way(), tensors, grad)


def fastest_tile(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    tiles = FORWARD_TILES[bucket(q.shape[-1])]
    return min(tiles, key=lambda tile: milliseconds(lambda: attention(q, k, v, None, tile))[1])


def cases(dtype: torch.dtype, heads: int, size: int, backward: bool) -> Iterator[Case]:
    ops = xformers_or_none()
    for length, keys in LENGTHS:
        for batch in BATCHES:
            q, k, v = (
                torch.randn(batch, n, heads, size, dtype=dtype).transpose(1, 2).requires_grad_(backward)
                for n in (length, keys, keys)
            )
            tile = fastest_tile(*(t.detach() for t in (q, k, v)))
            ways: dict[str, Callable[[], Any]] = {f"triton {tile}": partial(attention, q, k, v, None, tile)}
            ways |= {name: partial(sdpa, backend, q, k, v) for name, backend in BACKENDS.items()}
            ways["sdpa compiled"] = partial(torch.compile(sdpa), None, q, k, v)
            if ops is not None:
                ways["xformers"] = partial(xformers, ops, q, k, v)
            if backward:
                grad = torch.randn_like(q)
                ways = {name: partial(back, way, (q, k, v), grad) for name, way in ways.items()}
            # Two products in the forward pass, five more in the backward pass (Dao 2023, section 4.1).
            operations = 4 * batch * heads * length * keys * size * (3.5 if backward else 1)
            moved = batch * heads * size * 2 * (2 * length + 2 * keys) * (3 if backward else 1)
            shape = {"batch": batch, "heads": heads, "L": length, "S": keys, "D": size, "backward": backward}
            yield Case(shape, operations, moved, ways)


def masked_cases(dtype: torch.dtype, heads: int, size: int) -> Iterator[Case]:
    """Yield cases with a reference in which every fourth token is masked out."""
    length = LENGTHS[0][0]
    for batch in BATCHES:
        q, k, v = (torch.randn(batch, heads, length, size, dtype=dtype) for _ in range(3))
        mask = (torch.arange(length) % 4 != 0).expand(batch, -1)
        ways = {
            "triton, keys left out": lambda q=q, k=k, v=v, mask=mask: attention(q, k, v, compact(mask)),
            "sdpa, mask": partial(sdpa, None, q, k, v, mask=mask[:, None, None]),
        }
        kept = int(mask[0].sum())
        shape = {"batch": batch, "heads": heads, "L": length, "S": length, "kept": kept, "D": size}
        yield Case(shape, 4 * batch * heads * length * kept * size, batch * heads * size * 4 * (length + kept), ways)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
@click.option("--heads", default=10, show_default=True)
@click.option("--head-size", default=64, show_default=True)
def main(output: Path, dtype: str, heads: int, head_size: int) -> None:
    need_gpu()
    for backward in (False, True):
        measure("attention", cases(DTYPES[dtype], heads, head_size, backward), output)
    measure("attention", masked_cases(DTYPES[dtype], heads, head_size), output)


if __name__ == "__main__":
    main()
