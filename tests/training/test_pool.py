"""The pool of degraded crops that an identity is learned from; test_personalize.py covers its batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.faces.recognizer import face_map
from pfstorer_rt.models.base import build_base
from pfstorer_rt.training import pool
from pfstorer_rt.training.data import Square, cut_square, read_photo, resize_square
from pfstorer_rt.training.pool import face_in_square, make_pool


def test_small_photographs_are_degraded_at_their_own_size(photos):
    """Restoration enlarges small images after their degradation."""
    base = build_base("nano", seed=3)
    photo = torch.nn.functional.avg_pool2d(read_photo(photos[0])[None, :, :64, :64], 2)[0]
    enlarged = resize_square(photo, 64)
    settings = PersonalizeConfig(train=TrainConfig(batch=3), pool=12, p_hq=0.0)
    errors = [
        (found.hq - found.lq).square().mean() for found in (make_pool([p], base, settings) for p in (photo, enlarged))
    ]
    assert errors[0] > 1.8 * errors[1]


def test_crops_are_encoded_in_the_given_context_and_degraded_outside(photos, monkeypatch):
    """Degradation in bf16 would change the images that the latents and the losses see."""
    base, inside = build_base("nano", seed=3), []
    degraded = pool.degrade

    def recorded(*arguments):
        inside.append(torch.is_autocast_enabled("cpu"))
        return degraded(*arguments)

    monkeypatch.setattr(pool, "degrade", recorded)
    settings = PersonalizeConfig(train=TrainConfig(batch=2), pool=4)
    images = [read_photo(path) for path in photos[:2]]
    exact = make_pool(images, base, settings)
    fast = make_pool(images, base, settings, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert inside == [False] * 8
    for name in ("hq", "lq", "references"):
        one, other = getattr(exact, name), getattr(fast, name)
        assert one.dtype == other.dtype == torch.float32
        assert 0 < (one - other).abs().mean() < 0.02 * one.abs().mean()


@pytest.fixture(scope="module")
def portrait():
    """A photograph (3, 360, 400) with one face, turned by 15 degrees, and the position of the face."""
    turned = Image.fromarray(astronaut()).rotate(15, Image.Resampling.BICUBIC, center=(225, 120))
    pixels = np.ascontiguousarray(np.asarray(turned)[:360, 40:440] / np.float32(255))
    return torch.from_numpy(pixels).permute(2, 0, 1), face_map(pixels)


@pytest.mark.parametrize("square", [(0, 0, 360), (0, 75, 250), (10, 60, 270), (30, 40, 300), (-40, -20, 440)])
@pytest.mark.parametrize("flip", [False, True])
def test_the_face_of_a_crop_is_where_dlib_finds_it(portrait, square, flip):
    photo, face = portrait
    square = Square(*square, flip)
    expected = face_map(resize_square(cut_square(photo, square), 320).permute(1, 2, 0).numpy())
    found = face_in_square(face, photo.shape[-2:], square)
    corners = np.array([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]]).T
    np.testing.assert_allclose(found @ corners, expected @ corners, atol=0.08)  # of 2, the side of the crop


def test_a_crop_that_cuts_the_face_has_no_face(portrait):
    photo, face = portrait
    size = photo.shape[-2:]
    assert np.isfinite(face_in_square(face, size, Square(0, 20, 300, False))).all()
    assert np.isnan(face_in_square(face, size, Square(0, 180, 160, False))).all()
    assert np.isnan(face_in_square(np.full((2, 3), np.nan, np.float32), size, Square(0, 20, 300, True))).all()
