"""The configuration of a base directory, `config.json`: read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pfstorer_rt import checks
from pfstorer_rt.config import PRESETS, BaseConfig, PersonalizeConfig, StructureConfig, TrainConfig
from pfstorer_rt.diffusion import SAMPLERS
from pfstorer_rt.errors import SettingError
from pfstorer_rt.files import is_name

LARGEST = 1 << 20
"""Bytes of a `config.json`. The file of Stable Diffusion has about 3 KB."""

_PARTS = ("unet", "vae", "text", "cfw")
_SIZE = checks.whole(0, 65_536)
_REPEATED = dict.fromkeys(
    ("layers_per_block", "num_hidden_layers", "num_encoder_blocks", "num_decoder_blocks", "encoder_blocks"),
    checks.either(checks.whole(0, 48), checks.list_of(checks.whole(0, 48), 8)),
) | {"decoder_blocks": checks.list_of(checks.whole(0, 48), 8)}
"""Arguments that are numbers of layers. Building a million layers would take hours."""
_PLAIN = checks.either(checks.optional(checks.boolean), checks.number(-1e5, 1e5), checks.text(64))
_ARGUMENT = checks.either(checks.list_of(_PLAIN, 8), _PLAIN)

_STRUCTURE: dict[str, checks.Check] = {
    "width": checks.whole(1, 8192),
    "multipliers": checks.list_of(checks.whole(1, 64), 8, least=1),
    "heads": checks.whole(0, 256),
    "out_channels": checks.whole(1, 8192),
    "res_blocks": checks.whole(1, 16),
    "norm_groups": checks.whole(1, 1024),
}


def _trained(value: Any, name: str) -> None:
    """Check settings of `personalize`: known names, and values in the ranges of their fields."""
    known = {f.name for f in (*fields(TrainConfig), *fields(PersonalizeConfig))} - {"train", "layers", "device"}
    checks.record(dict.fromkeys(known, _PLAIN))(value, name)


_FIELDS: dict[str, checks.Check] = {
    "name": checks.text(64),
    "tile": checks.whole(16, 8192),
    **dict.fromkeys(_PARTS[:3], checks.table_of(lambda value, name: None, 64)),
    "cfw": checks.optional(checks.table_of(lambda value, name: None, 64)),
    "structure": checks.record(_STRUCTURE, ("width", "multipliers", "heads", "out_channels")),
    "layers": checks.list_of(checks.text(64), 64),
    "cfw_weight": checks.number(-10, 10),
    "head_size": checks.whole(1, 1024),
    "personalize": _trained,
    "spade_hidden": checks.whole(1, 8192),
    "prediction_type": checks.one_of("epsilon", "v_prediction"),
    "factor": checks.whole(1, 64),
    "prompt": checks.text(1000),
    "tokenizer": checks.one_of("bytes", "clip"),
    "sampler": checks.one_of(*SAMPLERS),
    "steps": checks.whole(1, 1000),
    "licence": checks.text(),
}
"""Check of every field of `BaseConfig`."""


def base_config_from_dict(data: Any) -> BaseConfig:
    """Read a `BaseConfig` from its JSON form; raises `ValueError` for fields or values that no base has."""
    needed = ("name", "tile", "unet", "structure", "vae", "text", "layers")
    try:
        checks.record(_FIELDS, needed)(data, "it")
        check_parts(data)
        if data["tile"] % data.get("factor", 8):
            raise ValueError(f"tile {data['tile']}, expected a multiple of the factor {data.get('factor', 8)}")
        PersonalizeConfig.for_base(_assembled(data))
    except ValueError as error:
        raise SettingError(f"base configuration: {error}") from error
    return _assembled(data)


def _assembled(data: Mapping[str, Any]) -> BaseConfig:
    structure = StructureConfig(**{**data["structure"], "multipliers": tuple(data["structure"]["multipliers"])})
    values = {**data, "layers": tuple(data["layers"]), "structure": structure}
    for part in ("unet", "vae", "cfw"):
        values[part] = _with_tuples(data.get(part))
    return BaseConfig(**values)


def check_parts(data: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an invalid name, and for a network argument that no preset has or that is out of range.

    The arguments are passed to constructors of diffusers and transformers. Some other arguments of these constructors
    name code to download and run (`attn_implementation`).
    """
    if not is_name(data["name"]):
        raise ValueError(f"name {str(data['name'])[:80]!r}, expected letters, digits, '_', '-'")
    given = {part: data.get(part) or {} for part in _PARTS}
    inner = given["cfw"].get("vae") or {}  # cfw can contain an autoencoder
    checks.table_of(_ARGUMENT, 64)(inner, "cfw vae")
    for part, values in (*given.items(), ("vae", inner)):
        if unknown := sorted(set(values) - known_arguments(part)):
            raise ValueError(f"{part} has unknown arguments {str(unknown)[:80]}")
        for name, value in values.items():
            if (part, name) != ("cfw", "vae"):
                _REPEATED.get(name, _ARGUMENT)(value, f"{part} {name}")
                examples = _examples(part, name)
                if examples and not any(_is_like(value, example) for example in examples):
                    raise ValueError(f"{part} {name} {str(value)[:80]!r}, expected such as {examples[0]!r}")
    if type(given["unet"].get("in_channels")) is not int:
        raise ValueError("unet has no whole number as in_channels")


def _examples(part: str, name: str) -> list[Any]:
    """Return the values of a network argument in all presets."""
    parts = [getattr(preset, part) or {} for preset in PRESETS.values()]
    return [values[name] for values in parts if name in values]


def _is_like(value: Any, example: Any) -> bool:
    """Whether a value has the type of an example; a list has any length, and items like one of the example's."""
    if isinstance(example, list | tuple):
        lists = isinstance(value, list | tuple) and bool(value)
        return lists and all(any(_is_like(item, known) for known in example) for item in value)
    return type(value) is type(example) or (type(example) is float and type(value) is int)


def known_arguments(part: str) -> set[str]:
    """Return the arguments of a network that a base's configuration may contain."""
    more = {"cfw": {"widths", "growth", "vae", "norm_groups"}, "vae": {"norm_num_groups", "scaling_factor"}}
    return {key for preset in PRESETS.values() for key in getattr(preset, part) or {}} | more.get(part, set())


def _with_tuples(value: Any) -> Any:
    """Convert lists to tuples at any depth, because JSON has only lists."""
    if isinstance(value, Mapping):
        return {k: _with_tuples(v) for k, v in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value
