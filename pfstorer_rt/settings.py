"""Checks of the settings in a dataclass: the types in its annotations, and ranges of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pfstorer_rt.errors import SettingError

Range = tuple[Callable[[Any], bool], str]
"""Test of a value, and the expected values for the error message."""


def whole(least: int, most: int | None = None) -> Range:
    """Return the range of whole numbers from `least` to `most`."""
    expected = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"
    return lambda v: is_whole(v) and least <= int(v) <= (int(v) if most is None else most), expected


def number(valid: Callable[[float], bool], expected: str) -> Range:
    """Return the range of the finite numbers that pass a test."""
    return lambda v: is_finite(v) and valid(float(v)), expected


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether a value is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; True and False are none."""
    try:
        return is_real(value) and math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def known_fields(kind: Any, names: Iterable[str]) -> set[str]:
    """Return the names of a dataclass's fields; raises `SettingError` if one of `names` is not among them."""
    known = {field.name for field in fields(kind)}
    for name in names:
        if name not in known:
            raise SettingError(f"setting {name!r}: expected one of {', '.join(sorted(known))}", setting=name)
    return known


def check_settings(config: Any, ranges: Mapping[str, Range] = MappingProxyType({})) -> None:
    """Raise `SettingError` for the first field of a dataclass with a value of another type, or out of range.

    ranges: field -> its range, in place of the type in its annotation.
    """
    kind: Any = type(config)
    for name, (valid, expected) in {**_types(kind), **ranges}.items():
        if not valid(value := getattr(config, name)):
            raise SettingError(f"{name.replace('_', ' ')} {value!r:.80}: expected {expected}", setting=name)


@cache
def _types(kind: Any) -> dict[str, Range]:
    return {name: _range_of(hint) for name, hint in get_type_hints(kind).items()}


_PLAIN: dict[Any, Range] = {
    bool: (lambda v: type(v) is bool, "True or False"),
    int: (is_whole, "a whole number"),
    float: (is_real, "a number"),
    NoneType: (lambda v: v is None, "None"),
}


def _range_of(hint: Any) -> Range:
    """Return the values of an annotation: plain types, classes, `Literal`, `X | Y` and `tuple[X, ...]`."""
    if get_origin(hint) is Literal:
        known = get_args(hint)
        return lambda v: isinstance(v, str) and v in known, f"one of {', '.join(known)}"
    if get_origin(hint) in (Union, UnionType):
        options = [_range_of(option) for option in get_args(hint)]
        return lambda v: any(valid(v) for valid, _ in options), " or ".join(expected for _, expected in options)
    if get_origin(hint) is tuple:
        valid, expected = _range_of(get_args(hint)[0])
        return lambda v: isinstance(v, tuple) and all(map(valid, v)), f"a tuple, and each item {expected}"
    return _PLAIN.get(hint, (lambda v: isinstance(v, hint), {str: "text"}.get(hint, f"a {hint.__name__}")))
