"""StableSR's checkpoints as a base: restricted reading, key conversion, strict loading (method: state dicts)."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)  # fmt: skip

from pfstorer_rt.config import PRESETS, BaseConfig
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import show_path
from pfstorer_rt.models.base import Base, build_base, read_network

Tensors = dict[str, torch.Tensor]
UNET, STRUCTURE, VAE, TEXT = (
    "model.diffusion_model.", "structcond_stage_model.", "first_stage_model.", "cond_stage_model.",
)  # fmt: skip
_ALLOWED = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    *(("torch", f"{kind}Storage") for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool", "Byte")),
}  # fmt: skip
_INERT = ("pytorch_lightning.", "lightning.", "torchmetrics.")


class Stub:
    """Stands for a Lightning object in a checkpoint: takes anything, does nothing."""

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers; every other class is refused by name, so no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class, or a stub for Lightning's; raises `BadFileError` for the rest."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module.startswith(_INERT):
            return Stub
        raise BadFileError(f"the checkpoint wants to run {module}.{name}; only tensors and containers are read")


def _restricted() -> ModuleType:
    """Return what torch.load takes for the pickle module: the restricted unpickler, and no plain `load`."""
    module = ModuleType("restricted_pickle")
    module.Unpickler = RestrictedUnpickler  # type: ignore[attr-defined]
    module.load = lambda file, **options: RestrictedUnpickler(file, **options).load()  # type: ignore[attr-defined]
    return module


def read_checkpoint(path: Path) -> Tensors:
    """Read a `.ckpt`/`.pt` (memory-mapped, nothing executed) or `.safetensors` file's tensors by key.

    Raises `BadFileError` when it is missing, damaged, holds no tensors or asks for other classes.
    """
    if not path.is_file():
        raise BadFileError(f"{show_path(path)}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        new = zipfile.is_zipfile(path)  # the older format of torch.save cannot be mapped
        data = torch.load(path, map_location="cpu", mmap=new, weights_only=False, pickle_module=_restricted())
    except BadFileError as error:
        raise BadFileError(f"{show_path(path)}: {error}") from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise BadFileError(f"{show_path(path)}: not a readable .ckpt or .safetensors file ({reason})") from error
    state = data.get("state_dict", data) if isinstance(data, Mapping) else {}
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise BadFileError(f"{show_path(path)}: no tensors in it; expected a StableSR checkpoint")
    return tensors


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

    Its attention keeps q, k and v together, head by head; they are taken apart here.
    """
    blocks = _block_places(tensors)
    out: Tensors = {}
    for key, value in tensors.items():
        place, _, leaf = key.partition(".")
        if place == "time_embed":
            out[leaf.replace("0.", "time_embedding.linear_1.").replace("2.", "time_embedding.linear_2.")] = value
            continue
        number, _, rest = leaf.partition(".")
        target = blocks[f"{place}.{number}"]
        if place == "input_blocks" or place == "middle_block":
            target, rest = _inside(place, target, rest)
        out.update(_leaf(target, rest, value, heads))
    return out


def _block_places(tensors: Tensors) -> dict[str, str]:
    """Map `input_blocks.N`, `middle_block.N` and `fea_tran.N` to places of `StructureEncoder`."""
    places = {"input_blocks.0": "conv_in", "middle_block.0": "mid_in", "middle_block.1": "mid_attention"}
    places["middle_block.2"] = "mid_out"
    count = 1 + max(int(m[1]) for k in tensors if (m := re.match(r"input_blocks\.(\d+)\.", k)))
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
    """Step into an input block: its residual block, its attention or its strided convolution."""
    if place == "middle_block":
        return target, rest
    index, _, rest = rest.partition(".")
    if target.startswith("downsamplers"):
        return target, rest.removeprefix("op.")
    if target == "conv_in":
        return target, rest
    return target.format("resnets" if index == "0" else "attentions"), rest


_RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def _leaf(target: str, rest: str, value: torch.Tensor, heads: int) -> Tensors:
    """Rename one tensor of a block, taking q, k and v apart."""
    name, _, kind = rest.rpartition(".")
    if name == "qkv":
        split = value.flatten(1) if value.ndim > 1 else value
        pieces = split.unflatten(0, (heads, 3, -1)).unbind(1)
        return {f"{target}.attn.to_{x}.{kind}": p.flatten(0, 1) for x, p in zip("qkv", pieces, strict=True)}
    if name == "proj_out":
        return {f"{target}.attn.to_out.0.{kind}": value.flatten(1) if value.ndim > 1 else value}
    name = _RESIDUAL.get(name, name)
    return {".".join(filter(None, (target, name, kind))): value}


def import_base(
    checkpoint: Path, output: Path, sd: str | Path | None = None, dtype: torch.dtype = torch.float16,
    prediction_type: str | None = None, config: BaseConfig | None = None,
) -> Base:  # fmt: skip
    """Turn a StableSR checkpoint, with SD 2.1's own weights where it lacks them, into a base directory.

    sd: diffusers directory or hub id of SD 2.1-base, for files that hold SPADEs and the structure
    encoder alone. prediction_type: epsilon or v_prediction; None takes v for a name with `768` or `face`.
    Raises `BadFileError` listing every missing, unexpected or mis-shaped key.
    """
    tensors = read_checkpoint(checkpoint)
    wide = bool(re.search(r"768|face", checkpoint.name))
    kind = prediction_type or ("v_prediction" if wide else "epsilon")
    config = replace(config or PRESETS["sd21"], prediction_type=kind)  # type: ignore[arg-type]
    if "768" in checkpoint.name:
        config = replace(config, tile=768)
    base = build_base(config)
    for name, state in convert(tensors, base, sd).items():
        load_strict(base.modules()[name], state, f"{checkpoint.name}: {name}")
    base.save(output, dtype)
    return base


def convert(tensors: Tensors, base: Base, sd: str | Path | None) -> dict[str, Tensors]:
    """Convert every network's tensors; those that the checkpoint lacks come from `sd`."""
    unet = convert_unet(part(tensors, UNET), base.unet.config)
    structure = convert_structure_encoder(part(tensors, STRUCTURE), base.config.structure.heads)
    states = {"structure_encoder": structure}
    if part(tensors, VAE):
        states["vae"] = convert_ldm_vae_checkpoint(part(tensors, VAE), base.vae.config)
        text = convert_open_clip_checkpoint(base.text_encoder.model, tensors, prefix=TEXT + "model.")
        return {**states, "unet": unet, "text_encoder": match_text_names(text, base)}
    if sd is None:
        raise BadFileError("the checkpoint holds StableSR's own parts only; give SD 2.1-base with --sd DIR|HUB_ID")
    folder = sd_folder(sd)
    text = read_network(folder / "text_encoder")
    return {
        **states, "vae": read_network(folder / "vae"), "text_encoder": match_text_names(text, base),
        "unet": {**read_network(folder / "unet"), **unet},
    }  # fmt: skip


def match_text_names(text: Tensors, base: Base) -> Tensors:
    """Drop or add the `text_model.` prefix, as the installed transformers names its CLIPTextModel."""
    prefixed = next(iter(base.text_encoder.model.state_dict())).startswith("text_model.")
    bare = {k.removeprefix("text_model."): v for k, v in text.items() if not k.endswith("position_ids")}
    return {f"text_model.{k}": v for k, v in bare.items()} if prefixed else bare


def sd_folder(sd: str | Path) -> Path:
    """Return a diffusers directory as it is, or fetch a hub id."""
    if Path(sd).is_dir():
        return Path(sd)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(sd), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client has errors of its own for each way to fail
        raise BadFileError(f"{sd}: neither a directory nor a hub id that can be fetched ({error})") from error


def load_strict(module: torch.nn.Module, state: Tensors, name: str) -> None:
    """Load a state dict; raises `BadFileError` that lists the keys that do not fit."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state]
    wrong += [f"unexpected {k}" for k in state if k not in own]
    wrong += [
        f"{k} is {list(state[k].shape)}, expected {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise BadFileError(f"{name}: {len(wrong)} keys do not fit: {'; '.join(wrong[:20])}{more}")
    module.load_state_dict({k: v.float() for k, v in state.items()})
