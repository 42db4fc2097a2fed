import numpy as np
import pytest

from pfstorer_rt.degradation.scratches import Scan, draw_damage


def damages(count=30, side=64):
    return [draw_damage(side, side + 32, np.random.default_rng(seed)) for seed in range(count)]


def test_a_seed_determines_the_damage():
    first, again, other = (draw_damage(64, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.color, again.color) and np.array_equal(first.opacity, again.opacity)
    assert not np.array_equal(first.opacity, other.opacity)


def test_damage_covers_a_small_part_with_bright_and_dark_marks():
    drawn = damages()
    assert {d.opacity.shape for d in drawn} == {(64, 96)} and {d.color.shape for d in drawn} == {(64, 96, 3)}
    assert all(part.min() >= 0 and part.max() <= 1 for d in drawn for part in d)
    covered = [float((d.opacity > 0.15).mean()) for d in drawn]
    assert 0.01 < np.mean(covered) < 0.35 and min(covered) < 0.01
    colors = np.concatenate([d.color[d.opacity > 0.5] for d in drawn]).mean(1)
    assert (colors > 0.8).mean() > 0.2 and (colors < 0.3).mean() > 0.05


def test_marks_cover_the_image_by_their_opacity():
    image, damage = np.full((64, 96, 3), 0.4, np.float32), damages()[3]
    marked = damage.on(image)
    expected = [0.4 + o * (c - 0.4) for o, c in zip(damage.opacity.ravel(), damage.color.reshape(-1, 3), strict=True)]
    assert np.abs(marked.reshape(-1, 3) - expected).max() < 1e-6 and np.abs(marked - image).max() > 0.1


def test_two_images_have_the_same_scan():
    rng = np.random.default_rng(0)
    first = rng.random((48, 64, 3), np.float32)
    second = first.copy()
    second[10:20, 10:30] = 0.9
    for seed in range(20):
        scan = lossless(Scan.random(48, 64, np.random.default_rng(seed)))
        a, b = scan.of(first), scan.of(second)
        assert a.shape == (48, 64, 3) and a.min() >= 0 and a.max() <= 1
        assert np.array_equal(a[30:], b[30:]) and np.array_equal(a[:, 40:], b[:, 40:]), seed
        assert np.abs(a - b).max() > 0.05, seed


def lossless(scan):
    return scan._replace(quality=None)  # JPEG spreads a change over its block


@pytest.mark.parametrize(("tone", "order"), [((1.0, 1.0, 1.0), 0), ((1.06, 0.97, 0.8), 1)])
def test_a_toned_scan_has_one_hue(tone, order):
    image = np.random.default_rng(1).random((32, 32, 3), np.float32)
    plain = Scan(0.0, tone, 0.0, np.zeros((32, 32, 1), np.float32), None)
    red, _, blue = np.moveaxis(plain.of(image), -1, 0)
    assert np.abs(red - blue).max() < 1 / 255 if order == 0 else (red >= blue).all()
    faded = plain._replace(fade=0.5).of(image)
    assert np.ptp(faded) == pytest.approx(np.ptp(plain.of(image)) / 2, abs=0.02)
