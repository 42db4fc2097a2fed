import numpy as np
import pytest
import torch
from PIL import Image

from pfstorer_rt.training.data import (
    Photographs,
    center_crop,
    mirror_beyond_edges,
    random_crop,
    read_photo,
    resize_square,
)


@pytest.fixture
def photos(tmp_path, make_image):
    """Seven photographs of other sizes."""
    for i in range(7):
        levels = (make_image(30 + 5 * i, 60 - 4 * i, seed=i) * 255).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{i}.png")
    return sorted(tmp_path.glob("*.png"))


# ---- samples


def test_a_crop_is_a_pure_function_of_seed_and_number(photos):
    one, two = Photographs(photos, 4), Photographs(photos, 4)
    for k in (5, 0, 20):
        two.crop(k, 16)
    for k in (0, 3, 20):
        (a, rng_a), (b, rng_b) = one.crop(k, 16), two.crop(k, 16)
        assert torch.equal(a, b) and rng_a.random() == rng_b.random()
    # within an epoch and in the next one, and for another seed, it is another crop
    crops = [one.crop(0, 16)[0], one.crop(1, 16)[0], one.crop(7, 16)[0], Photographs(photos, 5).crop(0, 16)[0]]
    assert not any(torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])


def test_every_epoch_is_another_permutation(photos):
    data = Photographs(photos, 0)
    epochs = [[data.order(k) for k in range(7 * e, 7 * e + 7)] for e in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    assert [Photographs(photos, 1).order(k) for k in range(7)] != epochs[0]
    assert len(data) == 7


# ---- cutting


@pytest.mark.parametrize("size", [1, 7, 16, 40])
@pytest.mark.parametrize("shape", [(30, 60), (61, 31), (40, 40), (1, 1), (1, 50), (3, 2)])
def test_crops_have_the_requested_size(shape, size):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    for cut in (random_crop(image, size, np.random.default_rng(0), zoom=3.0), center_crop(image, size)):
        assert cut.shape == (3, size, size) and cut.is_contiguous()
        assert cut.min() >= 0 and cut.max() <= 1, "bicubic overshoot is clamped"


def test_a_crop_without_zoom_is_a_square_of_the_short_side():
    image = torch.arange(3 * 4 * 9, dtype=torch.float32).reshape(3, 4, 9) / 108
    found = set()
    for seed in range(60):
        cut = random_crop(image, 4, np.random.default_rng(seed), zoom=1.0)
        matches = [
            (left, flip)
            for left in range(6)
            for flip in (False, True)
            if torch.equal(cut, image[:, :, left : left + 4].flip(-1) if flip else image[:, :, left : left + 4])
        ]
        assert len(matches) == 1
        found |= set(matches)
    assert len(found) == 12, "every place, mirrored and not"


def test_flips_can_be_disabled():
    image = torch.arange(12, dtype=torch.float32).reshape(1, 1, 12).expand(3, 12, 12) / 12
    for seed in range(20):
        cut = random_crop(image, 6, np.random.default_rng(seed), flip=False)
        assert (cut.diff(dim=-1) >= 0).all()


def test_zoom_limits_the_size_of_crops():
    ramp = torch.linspace(0, 1, 200).expand(3, 200, 200)
    spans = []
    for seed in range(80):
        cut = random_crop(ramp, 50, np.random.default_rng(seed), zoom=2.0)
        spans.append((cut.amax() - cut.amin()).item())
    assert min(spans) > 0.45 and max(spans) <= 1 and max(spans) - min(spans) > 0.3


def test_a_centre_crop_is_centred():
    image = torch.zeros(3, 8, 20)
    image[:, :, 6:14] = 1
    assert torch.equal(center_crop(image, 8), torch.ones(3, 8, 8))
    assert torch.equal(center_crop(image.transpose(1, 2), 8), torch.ones(3, 8, 8))


def test_resizing_keeps_flat_colour_and_shrinks_without_aliasing():
    assert torch.allclose(resize_square(torch.full((3, 9, 9), 0.3), 31), torch.full((3, 31, 31), 0.3), atol=1e-6)
    stripes = torch.zeros(3, 64, 64)
    stripes[:, :, ::2] = 1
    assert (resize_square(stripes, 16) - 0.5).abs().max() < 0.1


# ---- files


def test_a_photograph_is_read_as_planes_without_its_transparency(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    read = read_photo(tmp_path / "a.png")
    assert read.dtype == torch.float32 and read.is_contiguous()
    assert np.array_equal((read * 255).round().numpy(), levels[..., :3].transpose(2, 0, 1))


def test_wide_crops_mirror_the_photograph_at_its_borders():
    image = torch.rand(3, 20, 30)
    mirrored = mirror_beyond_edges(image, 34)
    assert mirrored.shape == (3, 34, 34)
    expected = np.pad(image.numpy(), ((0, 0), (7, 7), (2, 2)), mode="reflect")
    assert np.array_equal(mirrored.numpy(), expected)
    assert mirror_beyond_edges(image, 20) is image


def test_wide_crops_show_more_of_a_photograph():
    """A flat bright middle takes a smaller share of squares that reach beyond the edges."""
    image = torch.zeros(3, 40, 40)
    image[:, 10:30, 10:30] = 1

    def share(wide):
        crops = [random_crop(image, 40, np.random.default_rng(i), 1.0, wide=wide) for i in range(40)]
        return float(torch.stack(crops).mean())

    assert share(1.5) < 0.85 * share(1.0)
