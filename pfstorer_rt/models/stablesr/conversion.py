"""Convert StableSR's tensor names to the names of diffusers and of this package (method: state dicts)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

Tensors = dict[str, torch.Tensor]
UNET, STRUCTURE, VAE, TEXT = (
    "model.diffusion_model.",
    "structcond_stage_model.",
    "first_stage_model.",
    "cond_stage_model.",
)


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """Return the entries under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def convert_unet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Rename a UNet with its SPADEs, or the SPADEs alone (keys without prefix), to diffusers' names."""
    spades = {spade_name(k): v for k, v in tensors.items() if ".spade." in k}
    rest = {UNET + k: v for k, v in tensors.items() if ".spade." not in k}
    return {**(convert_ldm_unet_checkpoint(rest, config) if rest else {}), **spades}


def spade_name(key: str) -> str:
    """Rename one SPADE tensor of an SD 2.1 UNet: `input_blocks.4.0.spade.x` -> `down_blocks.1.resnets.0.spade.x`."""
    block, number, rest = key.split(".", 2)
    n = int(number)
    if block == "middle_block":
        return f"mid_block.resnets.{n // 2}.{rest}"
    rest = rest.split(".", 1)[1]
    if block == "input_blocks":
        return f"down_blocks.{(n - 1) // 3}.resnets.{(n - 1) % 3}.{rest}"
    return f"up_blocks.{n // 3}.resnets.{n % 3}.{rest}"


def convert_structure_encoder(tensors: Tensors, heads: int) -> Tensors:
    """Rename StableSR's `EncoderUNetModelWT` (keys without prefix) to `StructureEncoder`'s names.

    Its attention stores q, k and v in one tensor, head by head; this function splits them.
    """
    blocks = _block_places(tensors)
    out: Tensors = {}
    for key, value in tensors.items():
        place, _, leaf = key.partition(".")
        if place == "time_embed":
            out[leaf.replace("0.", "time_embedding.linear_1.").replace("2.", "time_embedding.linear_2.")] = value
            continue
        number, _, rest = leaf.partition(".")
        target = blocks.get(f"{place}.{number}")
        if target is None:
            out[key] = value  # `check_fit` then lists the unknown name as unexpected
            continue
        if place == "input_blocks" or place == "middle_block":
            target, rest = _inside(place, target, rest)
        out.update(_leaf(target, rest, value, heads))
    return out


def dropped(tensors: Mapping[str, torch.Tensor], converted: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the keys whose tensors a conversion left out; a conversion renames and reshapes without copying."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in converted.values()}
    return [key for key, tensor in tensors.items() if tensor.untyped_storage().data_ptr() not in kept]


def _block_places(tensors: Tensors) -> dict[str, str]:
    """Map `input_blocks.N`, `middle_block.N` and `fea_tran.N` to places of `StructureEncoder`."""
    places = {"input_blocks.0": "conv_in", "middle_block.0": "mid_in", "middle_block.1": "mid_attention"}
    places["middle_block.2"] = "mid_out"
    count = 1 + max((int(m[1]) for k in tensors if (m := re.match(r"input_blocks\.(\d+)\.", k))), default=0)
    level, inside = 0, 0
    for n in range(1, count):
        if f"input_blocks.{n}.0.op.weight" in tensors:
            places[f"input_blocks.{n}"] = f"downsamplers.{level}.conv"
            level, inside = level + 1, 0
        else:
            places[f"input_blocks.{n}"] = f"levels.{level}.{{}}.{inside}"
            inside += 1
    return places | {f"fea_tran.{i}": f"taps.{i}" for i in range(level + 1)}


def _inside(place: str, target: str, rest: str) -> tuple[str, str]:
    """Return the module inside an input block: its residual block, its attention or its strided convolution."""
    if place == "middle_block":
        return target, rest
    index, _, rest = rest.partition(".")
    if target.startswith("downsamplers"):
        return target, rest.removeprefix("op.")
    if target == "conv_in":
        return target, rest
    return target.format("resnets" if index == "0" else "attentions"), rest


_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _leaf(target: str, rest: str, value: torch.Tensor, heads: int) -> Tensors:
    """Rename one tensor of a block; q, k and v are split."""
    name, _, kind = rest.rpartition(".")
    if name == "qkv":
        split = value.flatten(1) if value.ndim > 1 else value
        if len(split) % (3 * heads):
            return {f"{target}.attn.to_q.{kind}": value}  # `check_fit` then lists the shape as wrong
        pieces = split.unflatten(0, (heads, 3, -1)).unbind(1)
        return {f"{target}.attn.to_{x}.{kind}": p.flatten(0, 1) for x, p in zip("qkv", pieces, strict=True)}
    if name == "proj_out":
        return {f"{target}.attn.to_out.0.{kind}": value.flatten(1) if value.ndim > 1 else value}
    name = _RESIDUAL.get(name, name)
    return {".".join(filter(None, (target, name, kind))): value}
