"""Image-space losses of restored latents: pixels, colours, perceptual distance and identity of the decoded image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.config import IMAGE_LOSSES
from pfstorer_rt.diffusion import LAST
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.faces.dlib import INSTALL_METRICS, RECOGNIZER, face_models
from pfstorer_rt.faces.recognizer import FaceRecognizer, cut_faces, face_map
from pfstorer_rt.imaging.perceptual import shift_tolerant_distance
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.cfw import Features
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.losses import Losses, color_loss, gradient_loss, repeated_error

PATCH = 96
"""Side in pixels of the crop for the perceptual distance, which on whole tiles would double the time of a step."""
REPEATED = 2.0
"""Weight of the repeated error in L_pixel. The other losses accept a faint grid of dots, one in each latent pixel."""
TERMS = ("image", "pixel", "color", "perceptual", "id", "face")
"""The weighted sum and its terms."""
NO_FACE = np.full((2, 3), np.nan, np.float32)


class ImageLossWeights(Protocol):
    """A configuration with the weights of the image-space losses."""

    @property
    def lambda_pixel(self) -> float:
        """Weight of L1 + gradient L1 + the repeated error."""

    @property
    def lambda_color(self) -> float:
        """Weight of the colour loss."""

    @property
    def lambda_perceptual(self) -> float:
        """Weight of ST-LPIPS."""

    @property
    def lambda_id(self) -> float:
        """Weight of the identity loss."""

    @property
    def lambda_face(self) -> float:
        """Weight of the distance between the recognizer's feature maps."""


def has_image_losses(config: ImageLossWeights) -> bool:
    """Whether a configuration has image-space losses."""
    return any(getattr(config, name) for name in IMAGE_LOSSES)


def refusal() -> str | None:
    """Return why image-space losses are not available here, or None when they are."""
    try:
        shift_tolerant_distance()
    except MissingBackendError as error:
        return str(error)
    return None if face_models() else INSTALL_METRICS


class ImageSpaceLoss(nn.Module):
    """Weighted sum of L_pixel, L_color, L_perceptual, L_id and L_face of restored latents, decoded.

    L_pixel: L1 + gradient L1 + `REPEATED` times the repeated error. L_color: `color_loss`. L_perceptual: ST-LPIPS of a
    square of `PATCH` pixels. L_id: squared distance between the embeddings of the restored face and the original's (the
    identity-preserving loss of GFPGAN, section 3.4, with dlib's network). L_face: distance between the feature maps of
    the same network (`feature_distances`). Both are means over the images with a face. Raises `MissingBackendError`
    without the `metrics` extra.
    """

    def __init__(self, base: Base, config: ImageLossWeights) -> None:
        super().__init__()
        folder = face_models()
        if folder is None:
            raise MissingBackendError(f"image-space losses need the networks of the metrics; {INSTALL_METRICS}")
        self.base, self.config = base, config
        self.vae, self.cfw = base.vae, base.cfw  # as modules, they get the memory layout and precision of the training
        self.recognizer, self.perceptual = FaceRecognizer(folder / RECOGNIZER), shift_tolerant_distance()

    def forward(
        self,
        restored: torch.Tensor,
        features: Features | None,
        hq: torch.Tensor,
        maps: torch.Tensor,
        corner: torch.Tensor,
    ) -> Losses:
        """Take restored latents (B, C, h, w), the features of the LQ images, and originals (B, 3, H, W) in [-1, 1].

        maps: (B, 2, 3), the position of each original's face (`face_map`), NaN without a face. corner: (2,), top and
        left of the crop for the perceptual distance. Returns the weighted sum `image` and its terms.
        """
        output = self.base.decode(restored, features).float()
        repeated = repeated_error(output, hq, self.base.config.factor)
        pixel = F.l1_loss(output, hq) + gradient_loss(output, hq) + REPEATED * repeated
        color = color_loss(output, hq)
        top, left = corner.tolist()
        patches = (self.perceptual.features(z[..., top : top + PATCH, left : left + PATCH]) for z in (output, hq))
        perceptual = self.perceptual.between(*patches).mean()
        identity, face = face_losses(self.recognizer, output, hq, maps)
        c = self.config
        total = c.lambda_pixel * pixel + c.lambda_color * color + c.lambda_perceptual * perceptual
        total = total + c.lambda_id * identity + c.lambda_face * face
        return dict(zip(TERMS, (total, pixel, color, perceptual, identity, face), strict=True))

    def of_batch(self, restored: torch.Tensor, batch: Batch) -> Losses:
        """Return the losses of the samples at timestep 999, where restoration starts; all 0 without such samples.

        restored: clean latents (B, C, h, w). batch: `hq_image lq_image` (B, 3, H, W) in [-1, 1], `t`, and the
        entries of `draw_views`.
        """
        first = batch["t"] == LAST
        if not first.any():
            return dict.fromkeys(TERMS, restored.new_zeros(()))
        with torch.no_grad():
            features = None if self.base.cfw is None else self.base.features(batch["lq_image"][first])
        return self(restored[first], features, batch["hq_image"][first], batch["maps"][first], batch["corner"])


def identity_loss(
    recognizer: FaceRecognizer, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared distance of embeddings of (B, 3, H, W) in [-1, 1], over the images with a face.

    maps: (B, 2, 3), NaN without a face; 0 without any face.
    """
    return face_losses(recognizer, output, target, maps)[0]


def face_losses(
    recognizer: FaceRecognizer, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `identity_loss`, and the mean of `feature_distances` over the same images."""
    seen = maps.isfinite().all(2).all(1)
    if not seen.any():
        return output.new_zeros(()), output.new_zeros(())
    identity, features = face_distances(recognizer, output[seen], target[seen], maps[seen])
    return identity.mean(), features.mean()


def identity_distances(
    recognizer: FaceRecognizer, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor
) -> torch.Tensor:
    """Return the squared distance (B,) of the embeddings of faces at `maps` (B, 2, 3) in (B, 3, H, W) in [-1, 1]."""
    return face_distances(recognizer, output, target, maps)[0]


def face_distances(
    recognizer: FaceRecognizer, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `identity_distances` and `feature_distances`, both (B,), of faces at `maps` (B, 2, 3)."""
    with torch.no_grad():
        original, wanted = recognizer.embed(cut_faces((target + 1) / 2, maps))
    restored, found = recognizer.embed(cut_faces((output + 1) / 2, maps))
    return (restored.float() - original.float()).square().sum(1), feature_distances(found, wanted)


def feature_distances(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the distance (B,) between feature maps (B, C, H, W) of several layers: LPIPS without learned weights.

    LPIPS (Zhang et al. 2018, section 3): the squared distance of the vectors, scaled to length 1, at each place; mean
    over the places, and here also over the layers. An embedding has no places. With the maps, a loss also compares the
    shapes of eyes, nose and mouth.
    """
    pairs = [(F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)) for a, b in zip(found, wanted, strict=True)]
    return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


def face_maps(images: Sequence[Pixels]) -> npt.NDArray[np.float32]:
    """Return the positions (N, 2, 3) of the largest faces of images (H, W, 3) in [0, 1], NaN for images without a face.

    The maps come from `pfstorer_rt.faces.recognizer.face_map`. Raises `MissingBackendError` without `metrics`.
    """
    return np.stack([NO_FACE if (found := face_map(image)) is None else found for image in images])


def draw_views(maps: npt.NDArray[np.float32], side: int, rng: np.random.Generator) -> Batch:
    """Draw `maps` (B, 2, 3), jittered, and `corner` (2,) of the perceptual crop, for images of `side` pixels."""
    moved = np.einsum("bij,bjk->bik", maps, jitter(len(maps), rng)).astype(np.float32)
    return {"maps": torch.from_numpy(moved), "corner": torch.from_numpy(rng.integers(0, max(0, side - PATCH) + 1, 2))}


def jitter(count: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Draw small rotations, scales and shifts (count, 3, 3): the identity loss must not depend on the exact crop."""
    angle, scale = rng.uniform(-0.1, 0.1, count), np.exp(rng.uniform(-0.06, 0.06, count))
    cos, sin, (x, y) = scale * np.cos(angle), scale * np.sin(angle), rng.uniform(-0.06, 0.06, (2, count))
    zero, one = np.zeros(count), np.ones(count)
    return np.stack([cos, -sin, x, sin, cos, y, zero, zero, one], 1).reshape(count, 3, 3)
