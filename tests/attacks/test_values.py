"""Option values that would overflow, never end, or name something else: refused when the command line is parsed."""

import click
import pytest

from pfstorer_rt.cli.program import cli
from pfstorer_rt.config import PersonalizeConfig, RestoreConfig, TrainConfig
from pfstorer_rt.plan import Manifest
from pfstorer_rt.runtime.recipe import Recipe

MANIFEST = Manifest("onnx", "fp32", 64, 8, 4, "epsilon", "ddpm", 4, "nano", "0" * 64, strength=True, cfw=True)

VALUES = [
    ("restore", "--strength", "nan"),
    ("restore", "--strength", "inf"),
    ("restore", "--scale", "-inf"),
    ("restore", "--cfw-weight", "nan"),
    ("restore", "--eta", "nan"),
    ("restore", "--idle", "nan"),
    ("restore", "--idle", "inf"),
    ("restore", "--steps", "1000000000"),
    ("restore", "--seed", "-1"),
    ("restore", "--quality", "0"),
    ("restore", "--tile-batch", "0"),
    ("personalize", "--first-step", "nan"),
    ("personalize", "--lambda-id", "inf"),
    ("personalize", "--learning-rate", "nan"),
    ("personalize", "--rank", "1000000000"),
    ("personalize", "--rank", "-1"),
    ("train-base", "--wide", "nan"),
    ("train-base", "--minutes", "inf"),
    ("bench", "--seconds", "nan"),
]


@pytest.mark.parametrize(("command", "option", "value"), VALUES)
def test_an_option_out_of_range_is_refused(command, option, value):
    found = cli.get_command(click.Context(cli), command)
    with pytest.raises(click.BadParameter) as caught:
        found.make_context(command, [option, value])
    assert caught.value.param and option in caught.value.param.opts


@pytest.mark.parametrize("value", [1e308, -1e308, 11.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["strength", "cfw_weight"])
def test_a_weight_above_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} .*expected -10 to 10"):
        Recipe.resolve(RestoreConfig(**{name: value}), MANIFEST)
    assert getattr(Recipe.resolve(RestoreConfig(**{name: 10.0}), MANIFEST), name) == 10


@pytest.mark.parametrize("device", ["evil", "cuda:x", "cpu; rm", "meta", "", "cuda:0\n", None, 7])
def test_a_device_that_does_not_exist_is_refused(device):
    with pytest.raises(ValueError, match="device"):
        TrainConfig(device=device)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 10**9),
        ("rank", -1),
        ("rank", True),
        ("first_step", float("nan")),
        ("p_self", 2),
        ("lambda_gen", -1),
        ("lambda_id", float("inf")),
        ("pool", 0),
        ("gen_rows", 0),
        ("token_learning_rate", 1),
        ("p_hq", "0.1"),
    ],
)
def test_a_setting_of_personalize_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=name.replace("_", " ")):
        PersonalizeConfig(**{name: value})
