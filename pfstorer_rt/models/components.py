"""The components of a plan, `encoder`, `denoiser` and `decoder`: modules, names of inputs, examples, free sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.models.vae import decode, encode_moments
from pfstorer_rt.plan import Manifest

EXAMPLE_BATCH = 2  # 0 and 1 would be taken for constants


def feature_names(base: Base) -> tuple[str, ...]:
    """Return the names of the LQ image's features that go from encoder to decoder."""
    return () if base.cfw is None else tuple(f"features_{level}" for level in base.cfw.levels)


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
        maps = (features[level] for level in self.cfw.levels)
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
        return self.cfw(self.vae, latent, dict(zip(self.cfw.levels, features, strict=True)), weight)


def component_modules(base: Base, identity: Identity | None = None) -> dict[str, nn.Module]:
    """Return the unfused component modules by name; raises `MismatchError` for an identity of another base."""
    return {"encoder": Encoder(base), "denoiser": Denoiser(base, identity), "decoder": Decoder(base)}


def component_names(component: str, base: Base, strength: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a component's input and output names, in order."""
    variational = base.config.vae["class"] == "AutoencoderKL"
    features = feature_names(base)
    return {
        "encoder": (("image",), (("mean", "std") if variational else ("mean",)) + features),
        "denoiser": (("x", "t", "z_lq", "strength") if strength else ("x", "t", "z_lq"), ("prediction",)),
        "decoder": (("latent", *features, "cfw_weight") if features else ("latent",), ("image",)),
    }[component]


def manifest(base: Base, identity: Identity | None = None, target: str = "torch", precision: str = "fp32") -> Manifest:
    """Describe a base and an identity as a plan would."""
    c = base.config
    return Manifest(
        target=target,
        precision=precision,
        tile=c.tile,
        factor=c.factor,
        latent_channels=c.latent_channels,
        prediction_type=c.prediction_type,
        sampler=c.sampler,
        steps=c.steps,
        base_name=c.name,
        base_fingerprint=base.fingerprint,
        identity_name=identity.name if identity else None,
        identity_fingerprint=identity.fingerprint if identity else None,
        method=identity.method if identity else None,
        strength=identity is not None and identity.method != "dreambooth",
        cfw=base.cfw is not None,
        cfw_weight=c.cfw_weight if base.cfw else 0.0,
        schedule=base.schedule,
        licence=c.licence,
    )


def example_inputs(
    component: str, base: Base, strength: bool, batch: int = EXAMPLE_BATCH, part: int = 1
) -> dict[str, torch.Tensor]:
    """Return inputs of a component with the statistics it meets in use.

    part: encoder and decoder, which know pictures of all sizes, get those of a tile's side over this.
    """
    generator = torch.Generator().manual_seed(0)
    side, channels = base.config.latent_tile, base.config.latent_channels
    side = side if component == "denoiser" else side // part

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if component == "encoder":
        return {"image": normal(batch, 3, side * base.config.factor, side * base.config.factor).clamp(-1, 1)}
    if component == "decoder":
        latent = {"latent": normal(batch, channels, side, side)}
        return latent | wrapped_features(base, example_inputs("encoder", base, False, batch, part)["image"])
    t = torch.rand(batch, generator=generator) * 999
    inputs = {"x": normal(batch, channels, side, side), "t": t, "z_lq": normal(batch, channels, side, side)}
    return {**inputs, "strength": torch.ones(1)} if strength else inputs


@torch.no_grad()
def wrapped_features(base: Base, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the decoder takes besides the latent: nothing, or the features of an LQ image and their weight."""
    if base.cfw is None:
        return {}
    maps, weight = base.features(image), torch.full((1,), base.config.cfw_weight or 0.5)
    return {**dict(zip(feature_names(base), maps.values(), strict=True)), "cfw_weight": weight}


def dynamic_shapes(component: str, base: Base, strength: bool) -> dict[str, Any]:
    """Return the free dimensions: the batch everywhere, height and width around the denoiser."""
    batch = torch.export.Dim("batch", min=1, max=256)
    if component == "denoiser":
        shapes: dict[str, Any] = {name: {0: batch} for name in ("x", "t", "z_lq")}
        return {**shapes, "strength": None} if strength else shapes
    factor = base.config.factor
    height, width = (torch.export.Dim(name, min=2, max=4096) for name in ("height", "width"))  # of the latent
    if component == "decoder":
        scales = {name: factor // 2 ** int(name.removeprefix("features_")) for name in feature_names(base)}
        features = {name: {0: batch, 2: n * height, 3: n * width} for name, n in scales.items()}
        return {"latent": {0: batch, 2: height, 3: width}, **features, "cfw_weight": None}
    return {"image": {0: batch, 2: factor * height, 3: factor * width}}
