"""A base: the frozen networks for training identities, stored as a directory in diffusers' layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel

from pfstorer_rt.base_config import LARGEST
from pfstorer_rt.base_files import NETWORKS, find_base, fingerprint_directory, read_config, read_network, reading_base
from pfstorer_rt.checks import read_json
from pfstorer_rt.config import PRESETS, BaseConfig, to_json
from pfstorer_rt.diffusion import Schedule
from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError
from pfstorer_rt.files import atomic_entries, check_space, fingerprint_tensors, open_plain
from pfstorer_rt.models.cfw import ControllableFeatureWrapping, Features
from pfstorer_rt.models.cfw_patch import PatchFeatureWrapping
from pfstorer_rt.models.cfw_tiny import TinyFeatureWrapping
from pfstorer_rt.models.personalization import PersonalizationBlock
from pfstorer_rt.models.prior import FOLDER, Prior
from pfstorer_rt.models.prompt import PLACEHOLDER, SUBJECT, PromptEncoder, tokenize
from pfstorer_rt.models.sharing import share_weights
from pfstorer_rt.models.structure import StructureEncoder
from pfstorer_rt.models.unet import RestorationUNet
from pfstorer_rt.models.vae import Autoencoder, build_vae, decode, encode_moments
from pfstorer_rt.ops import choose

Tensors = dict[str, torch.Tensor]
FeatureWrapping: TypeAlias = ControllableFeatureWrapping | TinyFeatureWrapping | PatchFeatureWrapping
WRAPPINGS: dict[str, Callable[..., FeatureWrapping]] = {
    "AutoencoderKL": ControllableFeatureWrapping,
    "AutoencoderTiny": TinyFeatureWrapping,
    "PatchAutoencoder": PatchFeatureWrapping,
}
"""The feature wrapping of each class of autoencoder."""


@dataclass
class Base:
    """The networks of a base, with plain tensors in and out."""

    config: BaseConfig
    unet: RestorationUNet
    structure_encoder: StructureEncoder
    vae: Autoencoder
    text_encoder: PromptEncoder
    schedule: Schedule
    fingerprint: str
    """sha256 over the sorted names and bytes of all tensors on disk."""
    cfw: FeatureWrapping | None = None
    """Controllable feature wrapping (StableSR section 3.3), for `features` and `decode`; None without one."""
    prior: Prior | None = None
    """Start of the training of identities; None starts with untrained blocks. It is not part of the fingerprint,
    because an identity contains its own blocks."""
    path: Path | None = field(default=None, compare=False)

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return torch.device(self.unet.device)

    @property
    def instant(self) -> bool:
        """Whether the base has a prior with which a person is learned without training."""
        return self.prior is not None and self.prior.instant

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by the names of their folders."""
        networks: dict[str, nn.Module] = {
            "unet": self.unet,
            "structure_encoder": self.structure_encoder,
            "vae": self.vae,
            "text_encoder": self.text_encoder.model,
        }
        return networks if self.cfw is None else {**networks, "cfw": self.cfw}

    def _all_networks(self) -> list[nn.Module]:
        return [*self.modules().values(), *([self.prior] if self.prior else [])]

    def encode(self, image: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode (B, 3, H, W) in [-1, 1] to a scaled latent (B, C, H/f, W/f).

        A variational encoder returns a sample of the posterior drawn from `generator` (StableSR), or its mean without
        a generator.
        """
        mean, std = encode_moments(self.vae, image)
        if std is None or generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        return mean + std * noise

    def features(self, image: torch.Tensor) -> Features:
        """Return the features of the LQ image (B, 3, H, W) in [-1, 1] for `decode`; raises `ValueError` without CFW."""
        if self.cfw is None:
            raise SettingError(
                f"base {self.config.name!r} has no controllable feature wrapping; import it with its CFW weights"
            )
        return self.cfw.features(self.vae, image)

    def decode(
        self, latent: torch.Tensor, features: Features | None = None, cfw_weight: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """Decode a scaled latent (B, C, h, w) to (B, 3, h*f, w*f), nominally in [-1, 1].

        features: the LQ image's features, from `features`; `cfw_weight` scales their effect on the decoder.
        """
        if features is None:
            return decode(self.vae, latent)
        if self.cfw is None:
            raise SettingError(
                f"base {self.config.name!r} has no controllable feature wrapping; import it with its CFW weights"
            )
        return self.cfw(self.vae, latent, features, cfw_weight)

    def encode_prompt(self, text: str | None = None, token: torch.Tensor | None = None) -> torch.Tensor:
        """Encode a prompt (None selects the base's prompt) to a context (1, L, D); `token` replaces `S*`.

        Raises `ValueError` for a prompt with `S*` without a token.
        """
        ids = tokenize(self.config.prompt if text is None else text, self.config)
        if token is None and bool((ids == PLACEHOLDER).any()):
            raise SettingError(f"the prompt contains {SUBJECT}, which needs a learned token; none was given")
        return self.text_encoder(ids.to(self.device), token)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Base:
        """Move every network in place; returns self."""
        for module in self._all_networks():
            nn.Module.to(module, device=device, dtype=dtype)
        return self

    def copy(self) -> Base:
        """Return a base whose networks share the weights of this one, without a copy of them in memory.

        Moving or converting the copy, or selecting its kernels, does not change this base.
        """
        memo: dict[int, Any] = {}
        return replace(
            self,
            unet=share_weights(self.unet, memo),
            structure_encoder=share_weights(self.structure_encoder, memo),
            vae=share_weights(self.vae, memo),
            text_encoder=share_weights(self.text_encoder, memo),
            cfw=None if self.cfw is None else share_weights(self.cfw, memo),
            prior=None if self.prior is None else share_weights(self.prior, memo),
        )

    def freeze(self) -> Base:
        """Switch every network to evaluation without gradients; returns self."""
        for module in self._all_networks():
            module.eval().requires_grad_(False)
        return self

    def set_attention(self, backend: str = "auto", *attached: nn.Module) -> str:
        """Select the backend of the kernels of UNet and structure encoder; returns its name.

        attached: further networks for the same backend, such as personalization blocks or a tuned UNet.
        Raises `MissingBackendError` when the backend cannot run here.
        """
        choice = choose(backend, self.device, self.config.head_size)
        for module in (self.unet, *(m for network in attached for m in network.modules())):
            if isinstance(module, (RestorationUNet, PersonalizationBlock)):
                module.set_kernels(choice.kernels)
        self.structure_encoder.set_attention(choice.kernels.attention)
        return choice.name

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the base as a directory (safetensors of `dtype`) and update `fingerprint`; returns the path.

        The weights in memory are rounded to the same values. An existing base is replaced when the new one is complete.
        """
        modules = self.modules()
        states = {n: m.state_dict() for n, m in modules.items()}
        write_base(path, self.config, modules, states, dtype, self.schedule, self.prior)
        for module in modules.values():
            kept = next(module.parameters()).dtype
            nn.Module.to(nn.Module.to(module, dtype), kept)
        self.fingerprint, self.path = fingerprint_directory(path), path
        return path


def build_base(preset: str | BaseConfig, seed: int = 0) -> Base:
    """Build a base with random weights.

    preset: a name in `PRESETS` or a configuration. Raises `ValueError` for an unknown name.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise SettingError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    config = PRESETS[preset] if isinstance(preset, str) else preset
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = assemble(config)
    base.fingerprint = fingerprint_modules(base.modules())
    return base.freeze()


def assemble(config: BaseConfig) -> Base:
    """Assemble the untrained networks of a configuration, on torch's default device."""
    unet, structure = RestorationUNet.from_base_config(config), StructureEncoder.from_base_config(config)
    vae, text = build_vae(config.vae), PromptEncoder.from_base_config(config)
    return Base(config, unet, structure, vae, text, Schedule(), "", build_cfw(config))


def build_cfw(config: BaseConfig) -> FeatureWrapping | None:
    """Build untrained feature wrapping for the autoencoder of a configuration; None without `cfw`."""
    return None if config.cfw is None else WRAPPINGS[config.vae["class"]](**config.cfw)


def load_base(path_or_name: str | Path, device: str | torch.device = "cpu") -> Base:
    """Load a base directory, or a shipped base by name, to fp32 networks in evaluation mode.

    Raises `BadFileError` for a directory that is not a base, and for a damaged base.
    """
    path = find_base(path_or_name)
    with reading_base(path):
        with init_empty_weights():  # avoids allocating tensors that the loaded ones replace
            base = assemble(read_config(path))
        base.schedule = read_schedule(path / "scheduler", base.config.prediction_type)
        for name, module in base.modules().items():
            module.load_state_dict({k: in_fp32(v) for k, v in read_network(path / name).items()}, assign=True)
        base.prior = Prior.load(path / FOLDER, base.unet, base.config)
        base.fingerprint, base.path = fingerprint_directory(path), path
    return base.freeze().to(device)


def read_schedule(folder: Path, prediction_type: str) -> Schedule:
    """Read the noise schedule of a base directory.

    Raises `BadFileError` when it is missing, `ValueError` when this version does not support it.
    """
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise BadFileError(f"{folder.name}/{file.name} is missing")
    with open_plain(file) as text:
        return Schedule.from_diffusers(read_json(text.read(LARGEST + 1), LARGEST), prediction_type)


def write_base(
    path: Path,
    config: BaseConfig,
    modules: Mapping[str, nn.Module],
    states: Mapping[str, Tensors],
    dtype: torch.dtype,
    schedule: Schedule = Schedule(),  # noqa: B008 (immutable)
    prior: Prior | None = None,
) -> None:
    """Write a base directory from its networks' configurations and tensors, one network in memory at a time.

    An existing base is replaced when the new one is complete, so the disk needs room for both. Unrelated files are left
    in place. Raises `PFStorerError` before anything is written when the disk has too little room.
    """
    check_room(path, modules, dtype)
    with atomic_entries(path, ("config.json", "scheduler", FOLDER, *NETWORKS)) as folder:
        if prior is not None:
            prior.save(folder / FOLDER)
        for name, module in modules.items():
            write_network(folder / name, module, states[name], dtype)
        (folder / "scheduler").mkdir()
        text = json.dumps(schedule.to_diffusers(config.prediction_type), indent=2)
        (folder / "scheduler" / "scheduler_config.json").write_text(text)
        (folder / "config.json").write_bytes(to_json(config).encode())


def check_room(path: Path, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Raise `PFStorerError` when the disk has no room for networks of these shapes, on any device."""
    tensors = [tensor for module in modules.values() for tensor in module.state_dict().values()]
    check_space(path, sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors))


def write_network(folder: Path, module: nn.Module, state: Tensors, dtype: torch.dtype) -> None:
    """Write the configuration and tensors of one network in diffusers' layout."""
    folder.mkdir()
    if isinstance(module, CLIPTextModel):
        file = folder / "model.safetensors"
        module.config.save_pretrained(folder)
    else:
        file = folder / "diffusion_pytorch_model.safetensors"
        module.save_config(folder)  # type: ignore[operator]
    tensors = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    try:
        safetensors.torch.save_file(tensors, file, {"format": "pt"})  # makes no copy
    except (SafetensorError, OSError) as error:
        reason = f"cannot be written ({error}); is the disk full?"
        raise PFStorerError(f"{folder.name}/{file.name}: {reason}") from error
    shutil.copymode(folder / "config.json", file)  # safetensors makes files readable by their owner only


def in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor of a file to memory; floating-point values become fp32.

    The copy is aligned. On unaligned tensors of a mapped file, vector instructions are slower and round differently.
    """
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def fingerprint_modules(modules: Mapping[str, nn.Module]) -> str:
    """Fingerprint networks in memory; equals the fingerprint of a directory saved in their dtype."""
    return fingerprint_tensors(
        (f"{name}.{key}", tensor)
        for name in sorted(modules)
        for key, tensor in sorted(modules[name].state_dict().items())
    )
