"""Random changes of the colours of training images."""

import colorsys

import numpy as np
import pytest
import torch

from pfstorer_rt.training.color_jitter import LEAST_SPAN, LUMA, draw_jitter, draw_tint

COLOR = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))


def changed(share, count=400):
    jitter = draw_jitter(count, share, np.random.default_rng(3))
    return jitter.apply(COLOR.expand(count, 3, 8, 8))


def test_the_share_of_the_changed_images_is_kept():
    same = (changed(0.0) == COLOR).flatten(1).all(1)
    assert same.all()
    # A part of the images that may be changed gets neither another colour nor another contrast.
    some = ((changed(0.5) - COLOR).abs().flatten(1).amax(1) > 1e-6).float().mean().item()
    every = ((changed(1.0) - COLOR).abs().flatten(1).amax(1) > 1e-6).float().mean().item()
    assert 0.5 < every < 0.8 and some == pytest.approx(every / 2, abs=0.08)


def test_images_become_grey_tinted_and_faded():
    images = changed(1.0)
    grey = (images.amax(1) - images.amin(1)).amax((1, 2)) < 1e-5
    span = images.flatten(1).amax(1) - images.flatten(1).amin(1)
    assert 0.02 < grey.float().mean() < 0.2
    assert (span < 0.8 * (COLOR.max() - COLOR.min())).float().mean() > 0.1 and span.min() > 0.8 * LEAST_SPAN * 0.5
    assert images.min() >= 0 and images.max() <= 1


def test_a_tint_keeps_the_luma_of_grey_and_differs_in_hue():
    rng = np.random.default_rng(5)
    tints = np.array([draw_tint(rng) for _ in range(200)])
    np.testing.assert_allclose(tints @ LUMA, 1)
    hues = [colorsys.rgb_to_hsv(*tint / tint.max())[0] for tint in tints]
    assert {int(6 * hue) % 6 for hue in hues} == set(range(6)), "every hue"


def test_images_of_one_batch_are_changed_separately():
    jitter = draw_jitter(40, 1.0, np.random.default_rng(3))
    images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    for k in range(40):
        alone = type(jitter)(*(part[k : k + 1] for part in jitter)).apply(images[k : k + 1])[0]
        values = images[k].numpy().reshape(3, -1)
        expected = jitter.matrix[k].numpy() @ values + jitter.offset[k].numpy()[:, None]
        expected = np.clip(expected, 0, 1) ** float(jitter.exponent[k]) * float(jitter.span[k]) + float(jitter.black[k])
        np.testing.assert_allclose(alone.numpy().reshape(3, -1), np.clip(expected, 0, 1), atol=1e-5)
        np.testing.assert_allclose(jitter.apply(images)[k], alone, atol=1e-6)
