"""Properties of the tile planner for any size: everything is covered, nothing lies outside."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfstorer_rt.imaging.bands import MAX_ENLARGEMENT, MAX_SCALE, PADDING, plan_canvas
from pfstorer_rt.tiling import axis_offsets, even_offsets, kept_spans, plan_tiles


@st.composite
def axes(draw, longest=3000):
    """A tile, an overlap and an axis that the tile fits into."""
    tile = draw(st.integers(1, 300))
    return draw(st.integers(tile, longest)), tile, draw(st.integers(0, tile - 1))


@settings(deadline=None, max_examples=300)
@given(axes())
def test_tiles_of_an_axis_cover_it_with_the_overlap_and_stay_inside(axis):
    length, tile, overlap = axis
    for offsets in (axis_offsets(*axis), even_offsets(*axis)):
        assert offsets[0] == 0 and offsets[-1] == length - tile and offsets == sorted(set(offsets))
        steps = [b - a for a, b in pairwise(offsets)]
        assert max(steps, default=0) <= max(tile - overlap, 1)
        assert len(offsets) == 1 or (len(offsets) - 2) * (tile - overlap) + tile < length, "as few as possible"
        spans = kept_spans(offsets, tile)
        assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]] and (spans[0][0], spans[-1][1]) == (0, length)
        assert all(o <= a <= b <= o + tile for o, (a, b) in zip(offsets, spans, strict=True))


@settings(deadline=None, max_examples=100)
@given(axes(400), st.integers(0, 400), st.booleans())
def test_every_pixel_of_a_canvas_is_in_a_tile(axis, more, even):
    import numpy as np

    height, tile, overlap = axis
    overlap = min(overlap, 3 * tile // 4)  # more tiles than that are only slow
    covered = np.zeros((height, tile + more), bool)
    for placed in plan_tiles(*covered.shape, tile, overlap, even):
        assert covered[placed.slices].shape == (tile, tile)
        covered[placed.slices] = True
    assert covered.all()


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([64, 192, 512]), st.floats(0.01, MAX_SCALE))
def test_a_canvas_contains_the_image_and_a_tile_with_minimal_padding(height, width, tile, scale):
    canvas = plan_canvas(height, width, tile, scale)
    for side, inner in zip(canvas.padded, (canvas.height, canvas.width), strict=True):
        assert side % PADDING == 0 and side >= max(tile, inner) and side - max(tile, inner) < PADDING
    assert (canvas.out_height, canvas.out_width) == (max(1, round(height * scale)), max(1, round(width * scale)))
    assert canvas.height <= round(height * max(MAX_ENLARGEMENT, scale)) + 1


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_scale_is_accepted_only_in_its_range(scale):
    if 0 < scale <= MAX_SCALE:
        plan_canvas(10, 10, 64, scale)
    else:
        with pytest.raises(ValueError, match="scale"):
            plan_canvas(10, 10, 64, scale)
