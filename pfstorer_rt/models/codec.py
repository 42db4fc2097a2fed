"""The `encoder` and `decoder` components: a base's autoencoder, with feature wrapping where it has that."""

from __future__ import annotations

import torch
from torch import nn

from pfstorer_rt.models import cfw
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.vae import decode, encode_moments


def feature_names(base: Base) -> tuple[str, ...]:
    """Return the names of the LQ image's features that go from encoder to decoder."""
    return () if base.cfw is None else tuple(f"features_{level}" for level in cfw.LEVELS)


class Encoder(nn.Module):
    """Image -> mean, std for a variational autoencoder, and the features that feature wrapping wants."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.vae, self.cfw = base.vae, base.cfw

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """image (B, 3, H, W) in [-1, 1] -> mean[, std], each (B, C, H/f, W/f), scaled[, features by level]."""
        if self.cfw is None:
            mean, std = encode_moments(self.vae, image)
            return (mean,) if std is None else (mean, std)
        mean, std, features = self.cfw.encode(self.vae, image)
        maps = (features[level] for level in cfw.LEVELS)
        return (mean, *maps) if std is None else (mean, std, *maps)


class Decoder(nn.Module):
    """Latent -> image; with feature wrapping, latent and the LQ image's features -> image."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.vae, self.cfw = base.vae, base.cfw

    def forward(self, latent: torch.Tensor, *wrapped: torch.Tensor) -> torch.Tensor:
        """latent (B, C, h, w), scaled[, features by level, cfw_weight (1,)] -> image (B, 3, h*f, w*f).

        The image is nominally in [-1, 1]; weight 0 gives that of the plain decoder.
        """
        if self.cfw is None:
            return decode(self.vae, latent)
        *features, weight = wrapped
        image: torch.Tensor = self.cfw(self.vae, latent, dict(zip(cfw.LEVELS, features, strict=True)), weight)
        return image
