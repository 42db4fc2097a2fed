from dataclasses import replace

import numpy as np
import pytest

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.imaging.bands import Resized
from pfstorer_rt.imaging.rows import Spool, from_pixels, read_pixels
from pfstorer_rt.imaging.shown import shown_to_networks
from pfstorer_rt.imaging.tone import unchanged
from pfstorer_rt.plan import Manifest
from pfstorer_rt.runtime import coarse
from pfstorer_rt.runtime.coarse import Guided, Passes, choose_scale
from pfstorer_rt.runtime.layout import Layout
from pfstorer_rt.runtime.part import base_layout
from pfstorer_rt.runtime.recipe import Recipe
from pfstorer_rt.runtime.selection import Area, Selection

MANIFEST = Manifest("onnx", "fp32", 512, 16, 32, "v_prediction", "ddim", 1, "portrait", "0" * 64)
ON = RestoreConfig(steps=2, sampler="ddpm", coarse="on")
OFF = replace(ON, coarse="off")


def layout(height, width, **settings):
    return Layout.of(height, width, Recipe.resolve(RestoreConfig(**settings), MANIFEST), MANIFEST, False)


@pytest.fixture
def face_of(monkeypatch):
    """Let the detector find one face of this size, or none."""

    def choose(side, height=2000, width=1500, **settings):
        monkeypatch.setattr(coarse, "largest_face", lambda source: side)
        return choose_scale(Spool(height, width), layout(height, width, **settings), MANIFEST.tile)

    return choose


@pytest.mark.parametrize("reduced", [(20, 30), (31, 43), (70, 90)])
def test_an_image_whose_coarse_result_equals_its_reduced_input_is_unchanged(make_image, reduced):
    image = Spool.of(from_pixels(make_image(48, 64)))
    low = Resized(image, *reduced, antialias=reduced[0] < 48)
    guided = Guided(image, low, low)
    assert np.array_equal(guided.read(0, 48), image.read(0, 48))
    assert np.array_equal(guided.read(7, 19), image.read(7, 19))


def test_low_frequencies_are_those_of_the_coarse_result_and_high_ones_those_of_the_input():
    y, x = np.mgrid[:96, :128]
    fine = 0.2 * (-1.0) ** (x + y)  # the reduction removes it
    slow, other = 0.3 * np.sin(x / 20), 0.3 * np.cos(y / 25)
    image = Spool.of(np.repeat((slow + fine)[None], 3, 0).astype(np.float32))
    reduced = Resized(image, 48, 64, antialias=True)
    restored = Resized(Spool.of(np.repeat(other[None], 3, 0).astype(np.float32)), 48, 64, antialias=True)
    guided = Guided(image, restored, reduced).read(0, 96)[0]
    assert np.abs(guided - (other + fine))[8:-8, 8:-8].max() < 0.02


def test_the_largest_face_fits_a_tile_in_the_coarse_pass(face_of):
    assert face_of(1000).scale == pytest.approx(0.8 * 512 / 1000)
    assert face_of(400, 800, 800, scale=2).scale == pytest.approx(0.8 * 512 / 400), "relative to the input"
    assert face_of(300).scale is None and face_of(None).scale is None, "one pass without a large face"


@pytest.mark.parametrize("size", [(2000, 1500), (900, 900), (800, 790), (640, 4000)])
@pytest.mark.parametrize("side", [420, 600, 1400])
def test_a_coarse_pass_costs_less_than_half_of_the_pixels_and_has_a_tile(face_of, size, side):
    scale = face_of(side, *size).scale
    if min(size) < 512 / 0.65:
        assert scale is None, "no room for a reduction"
    else:
        assert scale**2 < 0.43 and round(min(size) * scale) >= 512


def test_parity_mode_and_off_have_one_pass(face_of):
    assert face_of(1000, tile=TileConfig("parity")).scale is None
    assert face_of(1000, tile=TileConfig("parity"), coarse="on").scale
    assert face_of(1000, coarse="off").scale is None
    with pytest.raises(ValueError, match="coarse 'maybe': expected one of auto, on, off"):
        layout(64, 64, coarse="maybe")


def test_a_face_beyond_the_measured_sizes_gives_a_note(face_of):
    assert not face_of(1200, 3000, 3000).notes
    (text,) = face_of(2000, 3000, 3000).notes
    assert "a face of about 2000 pixels is larger than the 1638 pixels" in text and "use a smaller scale" in text


def test_without_a_detector_the_size_of_the_image_decides(without_dlib):
    choice = choose_scale(Spool(2400, 2000), layout(2400, 2000), MANIFEST.tile)
    assert choice.scale == pytest.approx(0.8 * 512 / (0.4 * 2000)) and "pfstorer-rt[metrics]" in choice.notes[0]
    large = choose_scale(Spool(6000, 4500), layout(6000, 4500), MANIFEST.tile)
    assert large.scale == 0.5 and "use a smaller scale" in large.notes[1]
    assert choose_scale(Spool(700, 700), layout(700, 700), MANIFEST.tile).scale is None


def test_an_image_without_faces_has_one_pass_of_plain_tiles(restorer, make_image):
    pixels = make_image(130, 150)
    assert restorer.needs_content(130, 150)
    assert np.array_equal(restorer.restore(pixels, replace(ON, coarse="auto")), restorer.restore(pixels, OFF))


def test_the_fine_pass_receives_the_coarse_result(restorer, face):
    pixels, seen = np.ascontiguousarray(face[60:190, 50:200]), []
    assert shown_to_networks(Spool.of(from_pixels(pixels))).back is unchanged, "the networks see the image as it is"
    source = Spool.of(from_pixels(pixels))
    passes = restorer.passes(source, ON)
    result = restorer.restore_rows(source, ON, lambda done, total: seen.append((done, total)), passes)
    assert seen[-1] == (passes.total, passes.total) and passes.total == passes.fine.total + passes.coarse.total
    first = restorer.restore_rows(source, replace(OFF, scale=passes.coarse.recipe.scale))
    guided = Guided(source, first, Resized(source, first.height, first.width, antialias=True))
    expected = restorer.restore_rows(guided, OFF)
    assert np.array_equal(read_pixels(result, 0, 130), read_pixels(expected, 0, 130))
    assert not np.array_equal(restorer.restore(pixels, ON), restorer.restore(pixels, OFF))


def test_the_identity_acts_in_the_coarse_pass_on_a_face_larger_than_a_tile(face_of):
    assert face_of(1000).limit == 0.8 * 512 and face_of(400, 800, 800, scale=2).limit == 0.4 * 512
    assert face_of(300, coarse="on").limit is None and face_of(300).limit is None
    passes = Passes(layout(2000, 1500), layout(2000, 1500, scale=0.4), limit=410)
    assert passes.last.recipe.strength == 0 and passes.coarse.recipe.strength == 1
    assert replace(passes, limit=None).last is passes.fine

    def chosen(*sides):
        faces = tuple(Area(0, 0, side, side) for side in sides)
        return replace(passes, selection=Selection(2000, 1500, faces)).last.recipe.strength

    assert chosen(900) == 0 and chosen(300) == 1 and chosen(900, 300) == 1, "a small face has its likeness from a tile"


def test_the_last_pass_has_the_strength_of_the_passes(personal, face):
    pixels = np.ascontiguousarray(face[60:190, 50:200])
    source = Spool.of(from_pixels(pixels))
    both = replace(personal.passes(source, ON), limit=None)

    def restored(passes):
        return read_pixels(personal.restore_rows(source, ON, passes=passes), 0, 130)

    first = restored(replace(both, limit=9))
    assert np.abs(first - restored(both)).max() > 0, "the identity acts in the last pass too"
    assert np.abs(first - restored(replace(both, limit=9, coarse=base_layout(both.coarse)))).max() > 0


def test_strength_0_equals_the_base_in_both_passes(restorer, personal, make_image):
    pixels = make_image(130, 150)
    # Two models run here: memory alignment may change the last bit of a float32 product.
    np.testing.assert_allclose(
        personal.restore(pixels, replace(ON, strength=0.0)), restorer.restore(pixels, ON), rtol=0, atol=1e-6
    )


def test_a_grey_image_stays_grey_in_both_passes(restorer, make_image):
    grey = np.repeat(make_image(130, 150)[..., :1], 3, -1)
    assert np.ptp(restorer.restore(grey, ON), axis=-1).max() == 0


def test_the_report_counts_the_tiles_of_both_passes(restorer, make_image):
    passes = restorer.passes(Spool.of(from_pixels(make_image(130, 150))), ON)
    facts, fine = passes.facts(), Passes(passes.fine).facts()
    assert facts["tiles"] == fine["tiles"] + passes.coarse.denoiser_tiles > fine["tiles"]
    assert facts["coarse_scale"] == round(passes.coarse.recipe.scale, 3) and "coarse_scale" not in fine
