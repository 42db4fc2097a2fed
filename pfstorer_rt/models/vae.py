"""Functions for any autoencoder: diffusers' AutoencoderTiny and AutoencoderKL, and PatchAutoencoder."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from typing_extensions import TypeIs

from pfstorer_rt.errors import SettingError
from pfstorer_rt.models.patch_autoencoder import PatchAutoencoder

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny | PatchAutoencoder
CLASSES = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL, "PatchAutoencoder": PatchAutoencoder}


def build_vae(config: dict[str, Any]) -> Autoencoder:
    """Build an untrained autoencoder from `BaseConfig.vae`; raises `ValueError` for an unknown class."""
    settings = dict(config)
    name = settings.pop("class")
    if name not in CLASSES:
        raise SettingError(f"autoencoder class {name!r}: expected one of {', '.join(CLASSES)}")
    return CLASSES[name](**settings)


def is_variational(vae: Autoencoder) -> TypeIs[AutoencoderKL]:
    """Whether the encoder returns a distribution (mean and standard deviation) in place of one latent."""
    return isinstance(vae, AutoencoderKL)


def encode_moments(vae: Autoencoder, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode (B, 3, H, W) in [-1, 1] to the scaled posterior's mean and standard deviation, (B, C, H/f, W/f).

    The standard deviation is None for a deterministic encoder.
    """
    scale = vae.config.scaling_factor
    if not is_variational(vae):
        return vae.encode(image).latents * scale, None
    posterior = vae.encode(image).latent_dist
    return posterior.mean * scale, posterior.std * scale


def decode(vae: Autoencoder, latent: torch.Tensor) -> torch.Tensor:
    """Decode a scaled latent (B, C, h, w) to (B, 3, h*f, w*f), nominally in [-1, 1]."""
    return vae.decode(latent / vae.config.scaling_factor).sample
