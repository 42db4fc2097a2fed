"""The pool of degraded crops that an identity is learned from; test_personalize.py covers its batches."""

import torch

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.models.base import build_base
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
