"""The components of a plan, `encoder`, `denoiser` and `decoder`, as networks with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pfstorer_rt.config import BaseConfig
from pfstorer_rt.diffusion import add_noise
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.models.vae import decode, encode_moments, is_variational
from pfstorer_rt.plan import Manifest

Inputs = dict[str, torch.Tensor]
"""Inputs of a component by name, in order."""
EXAMPLE_BATCH = 2
"""Batch of an export's example; the exporter treats 0 and 1 as constants."""
SCALARS = ("strength", "cfw_weight")
"""Inputs with one value for the whole batch."""


@dataclass(frozen=True)
class Component:
    """A network of a plan, with its inputs and outputs.

    The denoiser runs at every sampling step, on tiles of one size. Encoder and decoder run once per image, at any size.
    """

    name: str
    module: nn.Module
    """Its forward takes `inputs` in order and returns `outputs` in order."""
    config: BaseConfig
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    random_inputs: Callable[[int, int, torch.Generator], Inputs]
    """random_inputs(batch, side in pixels, generator)."""
    image_inputs: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator], Inputs]
    """image_inputs(LQ image, HQ image, timesteps (B,), generator)."""
    scales: Mapping[str, int] = field(default_factory=dict)
    """Image pixels per value along a side, for the inputs of free height and width; empty for the denoiser."""

    @property
    def every_step(self) -> bool:
        """Whether the component runs at every sampling step, on tiles of one size."""
        return not self.scales

    def with_module(self, module: nn.Module) -> Component:
        """Return the component with another module that has the same inputs and outputs."""
        return replace(self, module=module)

    def without_strength(self) -> Component:
        """Return the component without the input `strength`."""
        return replace(self, inputs=tuple(name for name in self.inputs if name != "strength"))

    def example_inputs(self, batch: int = EXAMPLE_BATCH, part: int = 1) -> Inputs:
        """Return random inputs with the statistics of real ones.

        part: a component that takes any image size gets images of the tile's side divided by this.
        """
        side = self.config.tile if self.every_step else self.config.tile // part
        with torch.no_grad():
            return self._ordered(self.random_inputs(batch, side, torch.Generator().manual_seed(0)))

    def inputs_of(self, lq: torch.Tensor, hq: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> Inputs:
        """Return the inputs of the component in the restoration of an LQ image, given its HQ image.

        lq, hq: (1, 3, H, W) in [-1, 1]. t: timesteps of the denoiser, (B,). generator: generator of its noise.
        """
        with torch.no_grad():
            return self._ordered(self.image_inputs(lq, hq, t, generator))

    def dynamic_axes(self) -> dict[str, dict[int, Any] | None]:
        """Return the free axes of each input: the batch, and height and width where the component takes any size."""
        batch = torch.export.Dim.DYNAMIC  # its bounds depend on the networks
        height, width = (torch.export.Dim(name, min=2, max=4096) for name in ("height", "width"))  # of the latent

        def free(name: str) -> dict[int, Any] | None:
            if name in SCALARS:
                return None
            if name not in self.scales:
                return {0: batch}
            times = self.config.factor // self.scales[name]
            return {0: batch, 2: times * height, 3: times * width}

        return {name: free(name) for name in self.inputs}

    def _ordered(self, found: Inputs) -> Inputs:
        return {name: found[name] for name in self.inputs}


def components(base: Base, identity: Identity | None = None) -> dict[str, Component]:
    """Return the unfused components; raises `MismatchError` for an identity of another base."""
    made = encoder(base), denoiser(base, identity), decoder(base)
    return {component.name: component for component in made}


def feature_names(base: Base) -> tuple[str, ...]:
    """Return the names of the LQ image's features, which the encoder passes to the decoder."""
    return () if base.cfw is None else tuple(f"features_{level}" for level in base.cfw.levels)


class Encoder(nn.Module):
    """Image -> mean, std for a variational autoencoder, and the features for feature wrapping."""

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


def encoder(base: Base) -> Component:
    """Return the encoder of a base."""
    moments = ("mean", "std") if is_variational(base.vae) else ("mean",)
    return Component(
        "encoder",
        Encoder(base),
        base.config,
        ("image",),
        moments + feature_names(base),
        lambda batch, side, generator: {"image": random_image(batch, side, generator)},
        lambda lq, hq, t, generator: {"image": lq},
        {"image": 1},
    )


class Decoder(nn.Module):
    """Latent -> image; with feature wrapping, latent and the LQ image's features -> image."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.vae, self.cfw = base.vae, base.cfw

    def forward(self, latent: torch.Tensor, *wrapped: torch.Tensor) -> torch.Tensor:
        """latent (B, C, h, w), scaled[, features by level, cfw_weight (1,)] -> image (B, 3, h*f, w*f).

        The image is nominally in [-1, 1]; weight 0 gives the image of the plain decoder.
        """
        if self.cfw is None:
            return decode(self.vae, latent)
        *features, weight = wrapped
        return self.cfw(self.vae, latent, dict(zip(self.cfw.levels, features, strict=True)), weight)


def decoder(base: Base) -> Component:
    """Return the decoder of a base."""
    config, features = base.config, feature_names(base)
    scales = {f"features_{level}": 2**level for level in (base.cfw.levels if base.cfw else ())}

    def random_inputs(batch: int, side: int, generator: torch.Generator) -> Inputs:
        latent = random_latent(config, batch, side, generator)
        return {"latent": latent, **wrapped_features(base, random_image(batch, side, generator))}

    return Component(
        "decoder",
        Decoder(base),
        config,
        ("latent", *features, "cfw_weight") if features else ("latent",),
        ("image",),
        random_inputs,
        lambda lq, hq, t, generator: {"latent": base.encode(hq), **wrapped_features(base, lq)},
        {"latent": config.factor, **scales},
    )


def wrapped_features(base: Base, lq: torch.Tensor) -> Inputs:
    """Return the decoder's inputs besides the latent: the features of an LQ image and their weight, or none."""
    if base.cfw is None:
        return {}
    maps, weight = base.features(lq), torch.full((1,), base.config.cfw_weight or 0.5)
    return {**dict(zip(feature_names(base), maps.values(), strict=True)), "cfw_weight": weight}


def denoiser(base: Base, identity: Identity | None = None) -> Component:
    """Return the denoiser of a base and an identity."""

    def random_inputs(batch: int, side: int, generator: torch.Generator) -> Inputs:
        t = torch.rand(batch, generator=generator) * 999
        x, z_lq = (random_latent(base.config, batch, side, generator) for _ in range(2))
        return {"x": x, "t": t, "z_lq": z_lq, "strength": torch.ones(1)}

    def image_inputs(lq: torch.Tensor, hq: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> Inputs:
        z = base.encode(hq)
        z_lq = z if lq is hq else base.encode(lq)
        noise = torch.randn((len(t), *z.shape[1:]), generator=generator)
        x = add_noise(z, noise, t.long(), base.schedule.alphas_cumprod_tensor())
        return {"x": x, "t": t, "z_lq": z_lq.expand(len(t), -1, -1, -1).contiguous(), "strength": torch.ones(1)}

    module = Denoiser(base, identity)
    ports = ("x", "t", "z_lq", "strength")
    made = Component("denoiser", module, base.config, ports, ("prediction",), random_inputs, image_inputs)
    return made if len(module.blocks) else made.without_strength()


def random_image(batch: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Return images of clipped normal noise, (B, 3, side, side) in [-1, 1]."""
    return torch.randn((batch, 3, side, side), generator=generator).clamp(-1, 1)


def random_latent(config: BaseConfig, batch: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Return latents of normal noise for images of `side` pixels."""
    side //= config.factor
    return torch.randn((batch, config.latent_channels, side, side), generator=generator)


def manifest(base: Base, identity: Identity | None = None, target: str = "torch", precision: str = "fp32") -> Manifest:
    """Return the manifest that a plan of a base and an identity has."""
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
        face=identity.face if identity else [],
        method=identity.method if identity else None,
        strength=identity is not None and identity.method != "dreambooth",
        cfw=base.cfw is not None,
        cfw_weight=c.cfw_weight if base.cfw else 0.0,
        schedule=base.schedule,
        licence=c.licence,
    )
