"""Measure what references and latents can contribute on a base, without any training.

    python benchmarks/reference_features.py FOLDER --recognizer FILE -o reference_features.json

FOLDER contains original images, which are cropped to a tile and heavily degraded, each with its own seed.

`match_t0`, `match_t999`: share of the tokens of a degraded image whose most similar token of the original image is the
one at the same position, by layer. The features of the degraded image are of timestep 999, those of the original of
timestep 0 or 999. `cosine`: mean similarity of the faces of result and original, by an ArcFace recognizer. The results
are: `input`, the degraded image; `base`, the restored image; `original_latents`, decoded from the latents of the
original with the features of the degraded image; `clean`, decoded from the original alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
import torch.nn.functional as F
from common import hwc, machine
from heldout import cosine_to

from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.diffusion import LAST, noisy_latent, x0_from_prediction
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.models.reference import reference_pass
from pfstorer_rt.training.data import center_crop, read_photo


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--recognizer", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--base", "name", default="portrait", show_default=True)
@click.option("--count", default=8, show_default=True, help="Number of images.")
def main(folder: Path, output: Path, recognizer: Path, name: str, count: int) -> None:
    base, similarity = load_base(name), cosine_to(recognizer)
    found: dict[str, dict[str, list[float]]] = {"match_t0": {}, "match_t999": {}, "cosine": {}}
    for number, path in enumerate(find_images([folder])[:count]):
        original = center_crop(read_photo(path), base.config.tile)
        hq, lq = (image[None] * 2 - 1 for image in (original, degrade(original, "heavy", number)))
        for timestep in (0, LAST):
            for layer, share in matches(base, hq, lq, timestep).items():
                found[f"match_t{timestep}"].setdefault(layer, []).append(share)
        for kind, image in decoded(base, hq, lq).items():
            value = similarity(hwc(image[0].clamp(-1, 1) / 2 + 0.5), hwc(original))
            if value is not None:
                found["cosine"].setdefault(kind, []).append(value)
    means = {part: {key: round(fmean(values), 3) for key, values in rows.items()} for part, rows in found.items()}
    report: dict[str, Any] = {**means, "images": count, "base": name, **machine()}
    output.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(json.dumps(means, indent=2))


@torch.no_grad()
def matches(base: Base, hq: torch.Tensor, lq: torch.Tensor, timestep: int) -> dict[str, float]:
    """Return the share of tokens whose most similar token of the original is at the same position, by layer."""
    context, alphas = base.encode_prompt(), base.schedule.alphas_cumprod_tensor()
    parts = base.unet, base.structure_encoder
    seen = [
        reference_pass(*parts, base.encode(image), context, base.config.layers, t, alphas)
        for image, t in ((lq, LAST), (hq, timestep))
    ]
    shares = {}
    for layer in base.config.layers:
        degraded, original = (centred(features[layer].features[0]) for features in seen)
        nearest = (degraded @ original.T).argmax(1)
        shares[layer] = float((nearest == torch.arange(len(nearest))).float().mean())
    return shares


def centred(tokens: torch.Tensor) -> torch.Tensor:
    """Normalise tokens (S, C) by layer norm, subtract their mean and scale them to length 1."""
    tokens = F.layer_norm(tokens, tokens.shape[-1:])
    return F.normalize(tokens - tokens.mean(0), dim=1)


@torch.no_grad()
def decoded(base: Base, hq: torch.Tensor, lq: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the images (1, 3, H, W) in [-1, 1] that are compared with the original."""
    z, z_lq, t = base.encode(hq), base.encode(lq), torch.tensor([LAST])
    alphas = base.schedule.alphas_cumprod_tensor()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    x = noisy_latent(z_lq, z_lq, noise, t, alphas)
    prediction = base.unet(x, t, base.encode_prompt(), base.structure_encoder(z_lq, t))
    restored = x0_from_prediction(x, prediction, t, alphas, base.config.prediction_type)
    features = base.features(lq)
    return {
        "input": lq,
        "base": base.decode(restored, features),
        "original_latents": base.decode(z, features),
        "clean": base.decode(z, base.features(hq)),
    }


if __name__ == "__main__":
    main()
