"""The shipped base on images that are larger than a tile: faces stay, and no face grows elsewhere."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.faces.finding import find_boxes, resized
from pfstorer_rt.imaging.rows import Spool, from_pixels
from pfstorer_rt.plan import DEFAULT_BASE
from pfstorer_rt.runtime.restorer import Restorer

SIDE = 512
"""Side of a material in pixels."""


@pytest.fixture(scope="module")
def shipped():
    with Restorer.from_base(DEFAULT_BASE, device="cpu") as restorer:
        yield restorer


def material(sigma, contrast, colour, seed=0):
    """Smooth noise around a colour, with fine noise over it: a plain surface in a bad photograph."""
    rng = np.random.default_rng(seed)
    rough = gaussian_filter(rng.standard_normal((SIDE, SIDE)), sigma, mode="wrap")
    grey = contrast * rough / rough.std() + 0.04 * rng.standard_normal((SIDE, SIDE))
    return (np.array(colour) * (1 + grey[..., None])).clip(0, 1).astype(np.float32)


MATERIALS = {
    "hair": material((40, 1.5), 0.2, (0.35, 0.25, 0.18)),
    "cloth": material((3, 9), 0.15, (0.25, 0.35, 0.5)),
    "wall": material(60, 0.05, (0.7, 0.68, 0.62)),
    "sky": material((20, 80), 0.1, (0.55, 0.7, 0.9)),
    "skin": material(30, 0.08, (0.8, 0.6, 0.5)),
}


@pytest.mark.parametrize("name", MATERIALS)
def test_no_face_grows_in_a_plain_material(shipped, name):
    assert not find_boxes(shipped.restore(MATERIALS[name]))


def blurred(pixels, sigma):
    """Blur (H, W, 3) and add noise."""
    noise = np.random.default_rng(1).standard_normal(pixels.shape) * 0.03
    return (gaussian_filter(pixels, (sigma, sigma, 0)) + noise).clip(0, 1).astype(np.float32)


def test_a_face_larger_than_a_tile_stays_one_face(shipped, face):
    lq = blurred(resized(face[30:190, 55:215], 5.5), 3)  # 880 pixels, the face has about 450
    assert shipped.passes(Spool.of(from_pixels(lq))).coarse is not None
    assert len(find_boxes(lq)) == len(find_boxes(shipped.restore(lq))) == 1


@pytest.mark.parametrize("scale", [1, 2])
def test_two_faces_stay_two(shipped, face, scale):
    lq = blurred(np.concatenate([face, face[:, ::-1]], 1), 1.5)
    result = shipped.restore(lq, RestoreConfig(scale=scale))
    assert result.shape == (256 * scale, 512 * scale, 3)
    assert len(find_boxes(lq)) == len(find_boxes(result)) == 2
