import math
import re
from dataclasses import fields

import numpy as np
import pytest

from pfstorer_rt.config import PRESETS, PersonalizeConfig, RestoreConfig, TileConfig, TrainConfig
from pfstorer_rt.errors import SettingError


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


def test_the_limits_of_training_settings_are_valid():
    TrainConfig(iterations=1, decay=1, weight_decay=0, ema=0, device="cuda:1", minutes=0.5, learning_rate=0.999)


def allows(config, name, value):
    try:
        config(**{name: value})
    except ValueError as error:
        assert str(error).startswith(f"{name.replace('_', ' ')} ") and ": expected " in str(error)
        assert len(str(error)) < 250 and "\n" not in str(error)
        return False
    return True


OPTIONAL = {"steps", "sampler", "cfw_weight", "overlap", "batch"}
"""Fields of a restoration that may be None, which selects the engine's default."""


@pytest.mark.parametrize("config", [RestoreConfig, TileConfig, PersonalizeConfig, TrainConfig])
def test_a_value_of_another_type_is_refused_on_construction(config):
    for wanted in fields(config):
        optional = config in (RestoreConfig, TileConfig) and wanted.name in OPTIONAL
        assert allows(config, wanted.name, None) == optional, wanted.name
        for value in ([], {}, object(), b"1", 1j, np.zeros(3), [["x\n"] * 1000], math.nan, 10**400):
            in_recipe = isinstance(value, (int, float)) and config in (RestoreConfig, TileConfig)
            assert not allows(config, wanted.name, value) or in_recipe or is_whole(wanted, value), (wanted.name, value)
        assert allows(config, wanted.name, getattr(config(), wanted.name))


def is_whole(wanted, value):
    """Whether a field is a whole number without a limit, and the value a whole number."""
    return isinstance(value, int) and wanted.type == "int"


@pytest.mark.parametrize(
    ("config", "name", "value", "expected"),
    [
        (RestoreConfig, "color_fix", "magic", "color fix 'magic': expected one of auto, adain, wavelet, none"),
        (RestoreConfig, "init", "zero", "init 'zero': expected one of lq, noise"),
        (RestoreConfig, "coarse", "maybe", "coarse 'maybe': expected one of auto, on, off"),
        (TileConfig, "mode", "slow", "mode 'slow': expected one of fast, parity"),
        (PersonalizeConfig, "framing", "x", "framing 'x': expected one of face, none"),
        (PersonalizeConfig, "train", {}, "train {}: expected a TrainConfig"),
        (RestoreConfig, "tile", None, "tile None: expected a TileConfig"),
        (RestoreConfig, "steps", "4", "steps '4': expected a whole number or None"),
    ],
)
def test_an_unknown_choice_is_refused_on_construction(config, name, value, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        config(**{name: value})


@pytest.mark.parametrize("value", [True, 1.0, -1, "1"])
def test_a_seed_that_is_no_whole_number_is_refused(value):
    assert not allows(RestoreConfig, "seed", value)


def test_numbers_of_numpy_are_accepted():
    assert RestoreConfig(seed=np.int64(3), strength=np.float32(0.5), steps=np.uint8(4)).seed == 3


@pytest.mark.parametrize(("train", "values"), [({"iterationz": 2}, {}), ({}, {"nosuch": 1}), ({"method": "vico"}, {})])
def test_an_unknown_setting_is_named(train, values):
    with pytest.raises(SettingError, match=r"expected one of .*(iterations|lambda_id)") as caught:
        PersonalizeConfig.for_base(PRESETS["portrait"], train, **values)
    assert caught.value.setting in {*train, *values}
