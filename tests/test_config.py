import math
from dataclasses import fields

import pytest

from pfstorer_rt.config import TRAIN_RANGES, TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("iterations", -1, "whole number of 0 or more"),
        ("iterations", 2.5, "whole number"),
        ("minutes", -1, "0 or more"),
        ("batch", True, "whole number"),
        ("learning_rate", 0, "above 0 and below 1"),
        ("learning_rate", math.nan, "above 0 and below 1"),
        ("weight_decay", -0.1, "0 or more"),
        ("warmup", -1, "whole number of 0 or more"),
        ("decay", 1.5, "share from 0 to 1"),
        ("clip", 0.0, "above 0"),
        ("clip", math.inf, "above 0"),
        ("ema", 1.0, "below 1"),
        ("precision", "fp8", "auto, fp32, bf16, fp16"),
        ("device", "gpu", "cuda:N"),
        ("attention", "flash", "xformers"),
        ("optimizer", "sgd", "adamw8bit"),
        ("gradient_checkpointing", "no", "True or False"),
        ("seed", -1, "whole number of 0 or more"),
        ("workers", None, "whole number of 0 or more"),
        ("checkpoint_every", 0, "whole number of 1 or more"),
    ],
)
def test_a_training_setting_out_of_range_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=expected) as refused:
        TrainConfig(**{name: value})
    assert str(refused.value).startswith(f"{name.replace('_', ' ')} {value!r}: expected ")


def test_every_training_setting_has_a_range_and_the_limits_are_valid():
    assert set(TRAIN_RANGES) == {f.name for f in fields(TrainConfig)}
    TrainConfig(iterations=1, decay=1, weight_decay=0, ema=0, device="cuda:1", minutes=0.5, learning_rate=0.999)
