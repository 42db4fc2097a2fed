"""What a component is tried on before it is shipped: a photograph, and the flat and noisy tiles that break halves."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch
from skimage import data

from pfstorer_rt.imaging.files import resize_bicubic
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.components import wrapped_features

TIMESTEPS = {"photo": (999.0, 250.0, 0.0), "noise": (999.0,), "white": (250.0,), "grey": (0.0,), "black": (0.0,)}
"""Where a denoiser is tried on each tile: on noise, halfway, and on an all but clean latent."""


def portrait() -> npt.NDArray[np.uint8]:
    """Return the face of scikit-image's public-domain astronaut, (256, 256, 3)."""
    return data.astronaut()[:256, 96:352]


def photograph(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Turn (H, W, 3) into (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def resize(image: torch.Tensor, side: int) -> torch.Tensor:
    """Resize (1, 3, H, W) to a square, without aliases."""
    return resize_bicubic(image, (side, side), antialias=side < image.shape[-1])


def add_noise(base: Base, z: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a latent (1, C, h, w) at the timesteps t (B,), with noise of its own for each (DDPM eq. 4)."""
    abar = base.scheduler.alphas_cumprod[t.long()][:, None, None, None]
    return abar.sqrt() * z + (1 - abar).sqrt() * torch.randn((len(t), *z.shape[1:]), generator=generator)


def probe_tiles(tile: int) -> dict[str, torch.Tensor]:
    """Return tiles (1, 3, tile, tile) in [-1, 1] by name: photo, grey, black, white, noise.

    The photograph is scikit-image's public-domain portrait.
    """
    photo = photograph(portrait())
    flat = {name: torch.full((1, 3, tile, tile), value) for name, value in (("grey", 0.0), ("black", -1.0))}
    noise = torch.rand((1, 3, tile, tile), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"photo": resize(photo, tile).clamp(-1, 1), **flat, "white": torch.ones(1, 3, tile, tile), "noise": noise}


@torch.no_grad()
def probe_inputs(
    component: str, base: Base, strength: bool, names: Collection[str] = tuple(TIMESTEPS)
) -> dict[str, dict[str, torch.Tensor]]:
    """Return a component's inputs for some of `probe_tiles`, by the tile's name.

    Encoder and decoder know pictures of all sizes, and get small ones where all places look the same.
    """
    probes: dict[str, dict[str, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(1)
    tile = base.config.tile
    tiles = probe_tiles(tile)
    if component != "denoiser":
        tiles |= {name: image for name, image in probe_tiles(tile // 4).items() if name != "photo"}
    for name, image in tiles.items():
        if name not in names:
            continue
        if component == "encoder":
            probes[name] = {"image": image}
            continue
        z = base.encode(image)
        if component == "decoder":
            probes[name] = {"latent": z, **wrapped_features(base, image)}
            continue
        t = torch.tensor(TIMESTEPS[name])
        x = add_noise(base, z, t, generator)
        probes[name] = {"x": x, "t": t, "z_lq": z.expand(len(t), -1, -1, -1).contiguous()}
        if strength:
            probes[name]["strength"] = torch.ones(1)
    return probes
