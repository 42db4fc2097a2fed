"""The pool of degraded crops that an identity is learned from; test_personalize.py covers its batches."""

import torch

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.models.base import build_base
from pfstorer_rt.training import pool
from pfstorer_rt.training.data import read_photo, resize_square
from pfstorer_rt.training.pool import make_pool


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
