import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from pfstorer_rt.tiling import (
    Blender,
    Tile,
    axis_offsets,
    blend,
    blend_by_rows,
    even_offsets,
    gaussian_weights,
    kept_spans,
    pad_to_multiple,
    plan_tiles,
    ramp_weights,
)


def walked_offsets(length, tile, overlap):
    """The same rule by walking along the axis until the end is covered."""
    n = 1
    while (n - 1) * (tile - overlap) + tile < length:
        n += 1
    return [min(k * (tile - overlap), length - tile) for k in range(n)]


def test_offsets_agree_with_a_loop_and_cover_the_axis():
    for tile in (1, 2, 7, 64):
        for overlap in {0, 1, tile // 2, tile - 1} & set(range(tile)):
            for length in range(tile, 3 * tile + 5):
                offsets = axis_offsets(length, tile, overlap)
                assert offsets == walked_offsets(length, tile, overlap)
                assert offsets[-1] + tile == length
                assert all(0 < b - a <= tile - overlap for a, b in pairwise(offsets))


def test_offsets_of_known_sizes():
    assert axis_offsets(64, 64, 32) == [0]
    assert axis_offsets(65, 64, 32) == [0, 1]
    assert axis_offsets(128, 64, 32) == [0, 32, 64]
    assert axis_offsets(1281, 1280, 280) == [0, 1]


@pytest.mark.parametrize(("length", "tile", "overlap"), [(63, 64, 0), (64, 64, 64), (64, 64, -1), (0, 0, 0)])
def test_impossible_tilings_are_refused(length, tile, overlap):
    with pytest.raises(ValueError, match=r"expected|shorter"):
        axis_offsets(length, tile, overlap)


def test_tiles_run_row_by_row():
    assert plan_tiles(5, 7, 4, 1) == [Tile(0, 0, 4, 4), Tile(0, 3, 4, 4), Tile(1, 0, 4, 4), Tile(1, 3, 4, 4)]


def test_tile_slices_cut_the_tile():
    canvas = np.arange(42).reshape(6, 7)
    assert np.array_equal(canvas[Tile(1, 3, 2, 4).slices], canvas[1:3, 3:7])


def test_weights_are_the_published_ones():
    weights = gaussian_weights(64, 64)
    assert weights.dtype == np.float64
    # Values of the reference implementation at T = 64, rows first; six digits are given.
    for place, value in {
        (0, 0): 3.25671e-10,
        (63, 0): 7.02700e-10,
        (31, 31): 15.674487,
        (32, 32): 15.866998,
    }.items():
        assert weights[place] == pytest.approx(value, rel=2e-6)


def test_weights_of_rows_and_columns_are_independent():
    tall, square = gaussian_weights(48, 20), gaussian_weights(20, 20)
    assert tall.shape == (48, 20)
    # The formula of the reference, with each axis' own side in the place of T.
    near = math.exp(-((5 - 24) ** 2) / 48**2 / 0.02) * math.exp(-((3 - 9.5) ** 2) / 20**2 / 0.02)
    assert tall[5, 3] == pytest.approx(near / (2 * math.pi * 0.01), rel=1e-12)
    # Along x the profile equals the profile of a tile of width 20, for any height.
    np.testing.assert_allclose(tall[24] / tall[24, 9], square[10] / square[10, 9], rtol=1e-12)
    np.testing.assert_allclose(tall, tall[:, ::-1], rtol=1e-9)  # m = (T-1)/2 is symmetric
    assert np.argmax(tall[:, 0]) == 24  # m = T/2 is not


def test_shared_weights_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        gaussian_weights(8, 8)[0, 0] = 1


def blended_in_float64(tiles, patches, height, width):
    total = np.zeros((patches[0].shape[0], height, width))
    mass = np.zeros((height, width))
    for (y, x, h, w), patch in zip(tiles, patches, strict=True):
        for i in range(h):
            for j in range(w):
                weight = gaussian_weights(h, w)[i, j]
                total[:, y + i, x + j] += weight * patch[:, i, j].astype(np.float64)
                mass[y + i, x + j] += weight
    return total / mass


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blend_is_the_weighted_mean(dtype):
    rng = np.random.default_rng(0)
    tiles = plan_tiles(13, 17, 8, 3)
    patches = [rng.standard_normal((2, 8, 8)).astype(dtype) for _ in tiles]
    out = blend(tiles, iter(patches), 13, 17)
    assert out.dtype == dtype
    # float32 accumulators: a few roundings of 6e-8 on values of about 3
    tolerance = 1e-12 if dtype is np.float64 else 2e-6
    np.testing.assert_allclose(out, blended_in_float64(tiles, patches, 13, 17), atol=tolerance)


def test_tiles_of_an_image_blend_into_the_image():
    image = np.random.default_rng(1).random((3, 100, 71))
    tiles = plan_tiles(100, 71, 64, 32)
    patches = (image[:, rows, columns].astype(np.float32) for rows, columns in (t.slices for t in tiles))
    out = blend(tiles, patches, 100, 71)
    np.testing.assert_allclose(out, image, atol=1e-6)  # also in the corners, which weigh 3e-10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_tile_is_returned_bit_for_bit(dtype):
    # A full range of magnitudes, where (p * w) / w does differ from p.
    rng = np.random.default_rng(2)
    patch = (rng.standard_normal((4, 64, 64)) * 10.0 ** rng.integers(-30, 30, (4, 64, 64))).astype(dtype)
    out = blend(plan_tiles(64, 64, 64, 32), [patch], 64, 64)
    assert out.dtype == dtype and out.tobytes() == patch.tobytes()
    assert not np.shares_memory(out, patch)


def test_a_second_whole_patch_is_averaged():
    blender = Blender(1, 4, 4)
    blender.add(Tile(0, 0, 4, 4), np.full((1, 4, 4), 1, np.float32))
    blender.add(Tile(0, 0, 4, 4), np.full((1, 4, 4), 2, np.float32))
    np.testing.assert_allclose(blender.result(), 1.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("given", [False, True])
def test_tensors_blend_as_arrays_do(dtype, given):
    rng = np.random.default_rng(0)
    tiles = plan_tiles(20, 33, 16, 8)
    patches = [rng.standard_normal((3, 16, 16)).astype(dtype) for _ in tiles]
    weights = rng.random((16, 16)) + 0.1 if given else None
    arrays = blend(tiles, patches, 20, 33, weights)
    tensors = blend(tiles, [torch.from_numpy(patch) for patch in patches], 20, 33, weights)
    assert isinstance(arrays, np.ndarray) and isinstance(tensors, torch.Tensor)
    assert np.array_equal(tensors.numpy(), arrays) and tensors.numpy().dtype == arrays.dtype


@pytest.mark.parametrize("weights", [None, np.ones((16, 16))])
def test_blending_stays_on_the_device_of_the_patches(weights):
    tiles = plan_tiles(20, 33, 16, 8)
    out = blend(tiles, [torch.empty(3, 16, 16, device="meta")] * len(tiles), 20, 33, weights)
    assert out.device.type == "meta" and out.dtype == torch.float32 and out.shape == (3, 20, 33)
    whole = blend([Tile(0, 0, 16, 16)], [torch.empty(3, 16, 16, device="meta")], 16, 16)
    assert whole.device.type == "meta"


def test_given_weights_are_used():
    left, right = Tile(0, 0, 1, 2), Tile(0, 1, 1, 2)
    patches = [np.zeros((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32)]
    out = blend([left, right], patches, 1, 3, weights=np.array([[3.0, 1.0]]))
    np.testing.assert_allclose(out, [[[0, 3 / 4, 1]]])


def test_uncovered_pixels_and_wrong_patches_are_refused():
    patch = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(ValueError, match="4 of 20 pixels lie under no tile"):
        blend([Tile(0, 0, 4, 4)], [patch], 4, 5)
    with pytest.raises(ValueError, match="2 of 16 pixels lie under no tile"):
        blend([Tile(0, 0, 4, 3), Tile(0, 1, 4, 3)], [patch[:, :, 1:]] * 2, 4, 4, weights=1.0 - np.eye(4, 3))
    with pytest.raises(ValueError, match="nothing"):
        Blender(1, 4, 4).result()
    with pytest.raises(ValueError, match="no tiles"):
        blend([], [], 4, 4)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        blend(plan_tiles(4, 7, 4, 1), [patch], 4, 7)
    with pytest.raises(ValueError, match="inside"):
        Blender(1, 4, 5).add(Tile(0, 2, 4, 4), patch)
    with pytest.raises(ValueError, match="patch of shape"):
        Blender(1, 4, 5).add(Tile(0, 0, 4, 4), patch[:, :3])
    with pytest.raises(ValueError, match="weights of shape"):
        Blender(1, 4, 5, np.ones((2, 2))).add(Tile(0, 0, 4, 4), patch)


def test_padding_reaches_the_next_multiple_of_each_axis_alone():
    assert pad_to_multiple(512, 513, 32) == (0, 31)  # the reference would give (32, 31)
    for height in (1, 31, 32, 33, 512):
        below, right = pad_to_multiple(height, 32, 32)
        assert right == 0 and 0 <= below < 32 and (height + below) % 32 == 0


# ---- fewer tiles


def test_even_offsets_are_as_many_and_share_the_excess():
    for tile, overlap in ((64, 32), (24, 6), (7, 0)):
        for length in range(tile, 5 * tile):
            offsets, fewest = even_offsets(length, tile, overlap), axis_offsets(length, tile, overlap)
            gaps = [b - a for a, b in pairwise(offsets)]
            assert len(offsets) == len(fewest) and offsets[0] == 0 and offsets[-1] + tile == length
            assert not gaps or (max(gaps) - min(gaps) <= 1 and max(gaps) <= tile - overlap)


def test_kept_spans_cover_once_and_stay_off_the_borders():
    for length in range(64, 400, 7):
        offsets = even_offsets(length, 64, 16)
        spans = kept_spans(offsets, 64)
        assert [p for start, stop in spans for p in range(start, stop)] == list(range(length))
        for offset, (start, stop) in zip(offsets, spans, strict=True):
            assert offset == 0 or start - offset >= 8
            assert offset + 64 == length or offset + 64 - stop >= 8


def test_ramp_weights_are_a_partition_of_unity():
    tiles = plan_tiles(42, 24 + 20 + 20, 24, 4, even=True)  # 24 + 18 high, so that rows share 6
    weights = ramp_weights(tiles)
    down, across = weights[:, 12], weights[12]
    np.testing.assert_allclose(weights, np.outer(down, across))
    for line, shared in ((down, 6), (across, 4)):
        np.testing.assert_allclose(line[-shared:] + line[:shared], 1, rtol=1e-12)
        assert line[shared:-shared].tolist() == [1] * (24 - 2 * shared) and 0 < line[0] < 0.05
    mass = blend(tiles, [np.ones((1, 24, 24), np.float32)] * len(tiles), 42, 64, weights)
    np.testing.assert_allclose(mass, 1, rtol=1e-6)


def test_tiles_without_overlap_have_uniform_weights():
    assert np.array_equal(ramp_weights(plan_tiles(16, 8, 8, 0, even=True)), np.ones((8, 8)))


def test_tiles_with_large_overlap_have_positive_weights():
    weights = ramp_weights(plan_tiles(9, 9, 8, 2, even=True))
    assert weights.min() > 0 and weights.max() == pytest.approx(weights[3, 3])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (50, 33), (16, 40), (37, 16)])
def test_blending_by_rows_equals_blending(height, width):
    rng = np.random.default_rng(3)
    tiles = plan_tiles(height, width, 16, 6)
    patches = [rng.standard_normal((3, 16, 16)).astype(np.float32) for _ in tiles]
    expected, found, next_row = blend(tiles, patches, height, width), np.zeros((3, height, width), np.float32), 0
    for start, rows in blend_by_rows(tiles, iter(patches), height, width):
        assert start == next_row
        found[:, start : start + rows.shape[1]] = rows
        next_row = start + rows.shape[1]
    assert next_row == height
    np.testing.assert_allclose(found, expected, atol=1e-5)
