"""The measure of visible tile borders finds borders that were drawn, and no others."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from pfstorer_rt.tiling import Tile, plan_tiles

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "seam_ratio.py"
spec = importlib.util.spec_from_file_location("seam_ratio", FILE)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seam_ratio = module.seam_ratio


def test_seam_ratio_detects_steps_at_tile_borders():
    rng = np.random.default_rng(5)
    tiles = plan_tiles(96, 160, 32, 0)
    image = rng.random((96, 160, 3))
    assert seam_ratio(image, tiles) == pytest.approx(1, abs=0.03)
    stepped = image.copy()
    stepped[:, 64:] += 1
    assert seam_ratio(stepped, tiles) > 1.1
    assert seam_ratio(np.zeros((96, 160, 3)), tiles) == 1
    flat = np.zeros((96, 160, 3))
    flat[32:] = 0.01
    assert seam_ratio(flat, tiles) == math.inf
    assert seam_ratio(image, [Tile(0, 0, 96, 160)]) == 1


def test_the_grid_of_a_decoder_does_not_count_as_a_seam():
    rng = np.random.default_rng(6)
    image = 0.1 * rng.random((96, 160, 3))
    image += np.floor(np.arange(160) / 8)[None, :, None]  # a step at every latent pixel
    tiles = plan_tiles(96, 160, 32, 0)
    assert seam_ratio(image, tiles, 8) == pytest.approx(1, abs=0.03)
    assert seam_ratio(image, tiles) > 2
