"""Hostile configurations of bases: each is refused before a network is built."""

import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import JSON, with_value

from pfstorer_rt.base_config import base_config_from_dict
from pfstorer_rt.base_files import network_files, read_config
from pfstorer_rt.config import PRESETS, to_json
from pfstorer_rt.errors import BadFileError


def config(name="nano"):
    return json.loads(to_json(PRESETS[name]))


@pytest.mark.parametrize("name", PRESETS)
def test_the_configuration_of_every_preset_is_read_back(name):
    assert json.loads(to_json(base_config_from_dict(config(name)))) == config(name)


WRONG = [
    (("unet", "layers_per_block"), 10**6),
    (("unet", "layers_per_block"), [2, 10**6]),
    (("unet", "block_out_channels"), "8"),
    (("unet", "block_out_channels"), [8] * 1000),
    (("unet", "in_channels"), "4"),
    (("unet", "attn_implementation"), "evil/code"),
    (("unet", "norm_num_groups"), {"a": 1}),
    (("vae", "num_encoder_blocks"), [10**6]),
    (("text", "num_hidden_layers"), 10**9),
    (("text", "hidden_size"), 1e308),
    (("structure", "res_blocks"), 10**6),
    (("structure", "multipliers"), []),
    (("structure", "multipliers"), [0]),
    (("structure", "width"), "8"),
    (("structure", "extra"), 1),
    (("tile",), "64"),
    (("tile",), 63),
    (("tile",), 2**40),
    (("factor",), 0),
    (("factor",), 1.5),
    (("steps",), 0),
    (("sampler",), "evil"),
    (("prediction_type",), []),
    (("layers",), "up_blocks.1.attentions.0"),
    (("layers",), [7]),
    (("name",), "../nano"),
    (("name",), 7),
    (("licence",), None),
    (("cfw_weight",), 1e308),
    (("cfw",), []),
    (("personalize",), {"rank": -1}),
    (("personalize",), {"iterations": "many"}),
    (("personalize",), {"device": "cuda:0"}),
    (("personalize",), {"evil": 1}),
    (("personalize",), []),
    (("prompt",), "x" * 100_000),
    (("prompt",), "\ud800"),
    (("evil",), 1),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda v: str(v)[:40])
def test_unknown_values_of_a_base_are_refused(path, value):
    changed, started = config(), time.monotonic()
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match="base configuration") as caught:
        base_config_from_dict(changed)
    assert len(str(caught.value)) < 500 and time.monotonic() - started < 1


@pytest.mark.parametrize("data", [None, [], "nano", 7, {}])
def test_json_without_a_configuration_is_refused(data):
    with pytest.raises(ValueError, match="base configuration"):
        base_config_from_dict(data)


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 10, " " * (2 << 20), '{"name": 1, "name": 2}', "\x00"])
def test_a_file_without_a_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r".+"):
        read_config(tmp_path)


def test_a_pipe_instead_of_weights_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BadFileError, match="no safetensors file"):
        network_files(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(BadFileError, match="a pipe or a device"):
        read_config(tmp_path)


PATHS = [(key,) for key in config()] + [
    (part, key) for part in ("unet", "vae", "text", "structure") for key in config()[part]
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_any_value_of_any_field_is_accepted_or_raises_value_error(path, value):
    changed = with_value(config(), path, value)
    try:
        found = base_config_from_dict(changed)
    except ValueError as error:
        assert len(str(error)) < 500
        return
    assert base_config_from_dict(json.loads(to_json(found))) == found
