"""`import-base`: convert StableSR's checkpoints, completed with SD 2.1's weights, to a base directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from torch import nn

from pfstorer_rt.base_files import fingerprint_directory, read_network
from pfstorer_rt.config import PRESETS, BaseConfig
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import real_path, show_path
from pfstorer_rt.models.base import assemble, check_room, write_base
from pfstorer_rt.models.cfw import LEVELS
from pfstorer_rt.models.stablesr.checkpoint import read_checkpoint
from pfstorer_rt.models.stablesr.conversion import (
    STRUCTURE,
    TEXT,
    UNET,
    VAE,
    Tensors,
    convert_structure_encoder,
    convert_unet,
    dropped,
    part,
)

TAESD = "madebyollin/taesd"
"""The tiny autoencoder of Stable Diffusion's latent space, on the hub."""

NETWORK_PREFIXES = (UNET, STRUCTURE, VAE, TEXT)
_BUFFERS = ("betas", "logvar", "lvlb_weights", "scale_factor", "cond_ids", "ori_timesteps")
_SCHEDULE = ("alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_")
"""Names and prefixes of the noise schedule's buffers."""
_TEXT_NAME = re.compile(
    r"model\.(positional_embedding|text_projection|logit_scale|attn_mask|token_embedding\.weight|ln_final\.\w+"
    r"|transformer\.resblocks\.\d+\..+)"
)
"""Tensors of OpenCLIP's text encoder; diffusers' converter ignores unknown ones outside the blocks."""


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    path: Path
    config: BaseConfig
    fingerprint: str
    from_name: dict[str, str | int]
    """Fields of `config` that were derived from the checkpoint's name."""


def import_base(
    checkpoint: Path,
    output: Path,
    sd: str | Path | None = None,
    dtype: torch.dtype = torch.float16,
    prediction_type: str | None = None,
    config: BaseConfig | None = None,
    cfw: Path | None = None,
    vae: str | Path | None = None,
    tile: int | None = None,
) -> Imported:
    """Convert a StableSR checkpoint to a base directory; missing weights come from SD 2.1.

    sd: diffusers directory or hub id of SD 2.1-base, for files that contain only SPADEs and the structure encoder.
    cfw: checkpoint of the feature-wrapping decoder. vae: `taesd`, directory or hub id of an AutoencoderTiny of SD's
    latent space, which replaces SD's autoencoder. prediction_type: `epsilon` or `v_prediction`; None is refused,
    because no checkpoint states it. tile: None derives it from the file's name (`name_kind`).
    One network at a time is in memory. Before anything is written, raises `BadFileError` with every
    missing, unexpected or mis-shaped key and every tensor with values that are not finite in `dtype`, and
    `PFStorerError` when the disk has too little room.
    """
    if output.exists() and not output.is_dir():
        raise BadFileError(f"{show_path(output)}: a file; a base is a folder, choose another name", setting="output")
    if sd is not None and Path(sd).is_dir() and real_path(output) == real_path(sd):
        raise BadFileError(
            f"{show_path(output)}: the new base would replace its SD 2.1 source files; choose another folder"
        )
    tensors = read_checkpoint(checkpoint)
    check_kind(tensors, checkpoint.name)
    config = config or PRESETS["sd21"]
    given = {k: v for k, v in (("prediction_type", prediction_type), ("tile", tile)) if v}
    from_name = {k: v for k, v in name_kind(checkpoint.name).items() if k not in given}
    config = replace(config, **{**from_name, **given})  # type: ignore[arg-type]
    states = convert(tensors, config, sd, checkpoint.name)
    if cfw is not None:
        if vae is not None:
            raise BadFileError(
                "the feature wrapping is for SD's own decoder, and another autoencoder replaces it; give one of the two"
            )
        states["cfw"], settings = convert_cfw(read_checkpoint(cfw), states["vae"], config, cfw.name)
        config = replace(config, cfw=settings)
    if vae is not None:
        states["vae"] = read_tiny_autoencoder(vae)
        config = replace(config, vae={"class": "AutoencoderTiny"})
    with torch.device("meta"):  # shapes and names only
        modules = assemble(config).modules()
    states["text_encoder"] = match_text_names(states["text_encoder"], modules["text_encoder"])
    sources = {name: f"{cfw.name if cfw and name == 'cfw' else checkpoint.name}: {name}" for name in modules}
    for name, module in modules.items():
        check_fit(module, states[name], sources[name])
    if prediction_type is None:
        raise BadFileError(
            f"{checkpoint.name}: it does not state what its UNet predicts; expected epsilon or v_prediction: "
            "see the page of the checkpoint and state it",
            setting="prediction_type",
        )
    check_room(output, modules, dtype)
    for name, source in sources.items():  # reads every tensor, so it comes after the checks of names
        check_finite(states[name], dtype, source)
    write_base(output, config, modules, states, dtype)
    return Imported(output, config, fingerprint_directory(output), from_name)


def check_kind(tensors: Tensors, name: str) -> None:
    """Raise `BadFileError` for a file that is not a StableSR checkpoint, or has tensors of unknown networks.

    Buffers of the noise schedule are accepted and computed again.
    """
    if any(key.startswith("model_ema.") for key in tensors) and not part(tensors, UNET):
        raise BadFileError(
            f"{name}: only the EMA (averaged) weights of the UNet, model_ema.*; expected the full checkpoint with "
            f"{UNET}* tensors"
        )
    if not part(tensors, STRUCTURE):
        raise BadFileError(
            f"{name}: no {STRUCTURE}* tensors in it; expected a StableSR checkpoint (not SD 2.1 itself, and not "
            "the feature-wrapping decoder)"
        )
    raise_if_any([f"unexpected {k}" for k in tensors if not is_known(k)], name)
    raise_if_any(unusable({k: v for k, v in tensors.items() if k.startswith(NETWORK_PREFIXES)}), name)


def is_known(key: str) -> bool:
    """Whether a checkpoint of StableSR can have a tensor of this name; the conversion checks the networks' names."""
    if key.startswith(TEXT):
        return _TEXT_NAME.fullmatch(key.removeprefix(TEXT)) is not None
    return key.startswith((*NETWORK_PREFIXES, "model_ema.")) or key in _BUFFERS or key.startswith(_SCHEDULE)


def unusable(tensors: Tensors) -> list[str]:
    """Return a line for each tensor without fractions, and for each tensor that shares its values with another one."""
    wrong: list[str] = []
    owners: dict[int, str] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            wrong.append(f"{key} is {tensor.dtype}, expected floating-point weights")
        place = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
        if place and (other := owners.setdefault(place, key)) != key:
            wrong.append(f"{key} shares the values of {other}, expected its own")
    return wrong


def name_kind(name: str) -> dict[str, str | int]:
    """Return the settings of a published StableSR file, derived from words in its name.

    `768` or `768v`: tiles of 768 pixels; `turbo`: 4 steps.
    """
    words = set(re.split(r"[\W_]+", name.lower()))
    kind: dict[str, str | int] = {}
    if words & {"768", "768v"}:
        kind["tile"] = 768
    return {**kind, "steps": 4} if "turbo" in words else kind


def convert(
    tensors: Tensors, config: BaseConfig, sd: str | Path | None, name: str = "the checkpoint"
) -> dict[str, Tensors]:
    """Convert every network's tensors; tensors that are missing in the checkpoint come from `sd`."""
    with torch.device("meta"):
        base = assemble(config)
    unet = convert_unet(part(tensors, UNET), base.unet.config)
    lost = [UNET + k for k in dropped(part(tensors, UNET), unet)]
    states = {"structure_encoder": convert_structure_encoder(part(tensors, STRUCTURE), config.structure.heads)}
    if part(tensors, VAE):
        states["vae"] = convert_ldm_vae_checkpoint(part(tensors, VAE), base.vae.config)
        lost += [VAE + k for k in dropped(part(tensors, VAE), states["vae"])]
    raise_if_any([f"unexpected {k}" for k in lost], name)
    if "vae" in states:
        text = convert_open_clip_checkpoint(base.text_encoder.model, tensors, prefix=TEXT + "model.")
        return {**states, "unet": unet, "text_encoder": text}
    if sd is None:
        raise BadFileError(f"{name}: contains StableSR's own parts only; give SD 2.1-base too", setting="sd")
    folder = fetch(sd)
    return {
        **states,
        "vae": read_network(folder / "vae"),
        "text_encoder": read_network(folder / "text_encoder"),
        "unet": {**read_network(folder / "unet"), **unet},
    }


def convert_cfw(
    tensors: Tensors, vae: Tensors, config: BaseConfig, name: str = "the feature-wrapping checkpoint"
) -> tuple[Tensors, dict[str, object]]:
    """Convert the feature-wrapping checkpoint: (tensors, settings of `ControllableFeatureWrapping`).

    The file also contains an autoencoder. It is kept only if it differs from the base's autoencoder (`vae`).
    """
    tensors = {k.removeprefix(VAE): v for k, v in tensors.items() if not k.removeprefix(VAE).startswith("loss.")}
    fusion = {k.removeprefix("decoder."): v for k, v in tensors.items() if k.startswith("decoder.fusion_layer_")}
    if not fusion:
        raise BadFileError(
            f"{name}: no decoder.fusion_layer_* tensors in it; expected the checkpoint vqgan_cfw_00011.ckpt"
        )
    widths = tuple(config.vae["block_out_channels"][level] for level in LEVELS)
    first = fusion.get("fusion_layer_1.encode_enc_2.0.rdb1.conv1.weight")
    settings: dict[str, object] = {
        "widths": widths,
        "growth": 32 if first is None else len(first),
        "vae": None,
        "norm_groups": config.vae.get("norm_num_groups", 32),
    }
    with torch.device("meta"):
        layout = assemble(config).vae
    rest = {k: v for k, v in tensors.items() if not k.startswith("decoder.fusion_layer_")}
    own = convert_ldm_vae_checkpoint(rest, layout.config) if rest else {}
    if all(k in vae and vae[k].shape == v.shape and close(v, vae[k]) for k, v in own.items()):
        return fusion, settings
    return fusion | {f"autoencoder.{k}": v for k, v in own.items()}, {**settings, "vae": config.vae}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal except for rounding to fp16."""
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-6)


def read_tiny_autoencoder(source: str | Path) -> Tensors:
    """Read an AutoencoderTiny in diffusers' layout, or as TAESD's files `taesd_encoder` and `taesd_decoder`."""
    folder = fetch(TAESD if str(source) == "taesd" and not Path(source).is_dir() else source)
    if not (folder / "taesd_encoder.safetensors").is_file():
        return read_network(folder)
    state: Tensors = {}
    # The first layer of TAESD's decoder is a clamp, which diffusers does not count as a layer.
    for half, shift in (("encoder", 0), ("decoder", -1)):
        for key, value in read_checkpoint(folder / f"taesd_{half}.safetensors").items():
            number, _, rest = key.partition(".")
            state[f"{half}.layers.{int(number) + shift}.{rest}"] = value
    return state


def match_text_names(text: Tensors, model: nn.Module) -> Tensors:
    """Drop or add the `text_model.` prefix, to match CLIPTextModel of the installed transformers."""
    prefixed = next(iter(model.state_dict())).startswith("text_model.")
    bare = {k.removeprefix("text_model."): v for k, v in text.items() if not k.endswith("position_ids")}
    return {f"text_model.{k}": v for k, v in bare.items()} if prefixed else bare


def fetch(source: str | Path) -> Path:
    """Return a directory in diffusers' layout; a hub id is downloaded first."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client raises many error types
        reason = " ".join(str(error).split())[:200]
        raise BadFileError(f"{source}: neither a directory nor a hub id that can be fetched ({reason})") from error


def check_fit(module: nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise `BadFileError` with the keys of a state dict that do not fit a network (on any device)."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state]
    wrong += [f"unexpected {k}" for k in state if k not in own]
    wrong += [
        f"{k} is {list(state[k].shape)}, expected {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    raise_if_any(wrong, name)


def check_finite(state: Mapping[str, torch.Tensor], dtype: torch.dtype, name: str) -> None:
    """Raise `BadFileError` with the tensors that have NaN or values beyond the range of `dtype`."""
    limit = torch.finfo(dtype).max
    wrong = [k for k, v in state.items() if v.is_floating_point() and not bool((v.abs() <= limit).all())]
    raise_if_any([f"{k} has NaN or values beyond {limit:.6g} ({dtype})" for k in wrong], name)


def raise_if_any(wrong: list[str], name: str) -> None:
    """Raise `BadFileError` with the first twenty entries of a list, unless it is empty."""
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise BadFileError(f"{name}: keys do not fit, {len(wrong)}: {'; '.join(wrong[:20])}{more}")
