"""Exact checks of values that were read from another person's file: keys, types, ranges and sizes.

A check is a function (value, name). Its result is not used. It raises `ValueError` with the name, the value that was
found, and what was expected. A reader checks everything once, when it opens a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

Check = Callable[[Any, str], object]

FACE_SIZE = 128
"""Numbers of an embedding of a face (dlib)."""
_SHOWN = 80  # characters of a wrong value in a message


def read_json(data: bytes | str, most: int) -> Any:
    """Parse JSON from a file; raises `ValueError` for text that is too long, nested too deeply, or no strict JSON.

    most: largest accepted length. Repeated keys, NaN and infinities are no strict JSON, nor are numbers that overflow.
    """
    if len(data) > most:
        raise ValueError(f"{len(data)} bytes of JSON, expected at most {most}")
    try:
        return json.loads(
            data, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a repeated key in JSON")
    return found


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:_SHOWN]} in JSON")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} in JSON")


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name} {str(value)[:_SHOWN]!r}, expected {expected}")


def whole(least: int, most: int) -> Check:
    """Return a check for whole numbers from `least` to `most`."""

    def check(value: Any, name: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(name, value, f"a whole number from {least} to {most}")

    return check


def number(least: float, most: float) -> Check:
    """Return a check for finite numbers from `least` to `most`."""

    def check(value: Any, name: str) -> None:
        if type(value) not in (int, float) or not least <= value <= most:  # NaN lies in no range
            raise _wrong(name, value, f"a number from {least:g} to {most:g}")

    return check


def boolean(value: Any, name: str) -> None:
    """Check that a value is true or false."""
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")


def text(longest: int = 200, pattern: str | None = None, expected: str = "") -> Check:
    """Return a check for strings that match a pattern entirely. expected: description of the pattern.

    Without a pattern, zeros and halves of surrogate pairs, which no encoding accepts, are refused.
    """
    expected = expected or f"text of at most {longest} characters"
    compiled = re.compile(pattern or r"[^\0\ud800-\udfff]*", re.DOTALL)

    def check(value: Any, name: str) -> None:
        if type(value) is not str or len(value) > longest or not compiled.fullmatch(value):
            raise _wrong(name, value, expected)

    return check


def one_of(*known: Any) -> Check:
    """Return a check for one of some strings, numbers or None."""

    def check(value: Any, name: str) -> None:
        if not any(type(value) is type(item) and value == item for item in known):
            raise _wrong(name, value, f"one of {', '.join(map(str, known))}")

    return check


def optional(check: Check) -> Check:
    """Return a check that also accepts None."""
    return lambda value, name: None if value is None else check(value, name)


def either(*checks: Check) -> Check:
    """Return a check for values that pass one of several checks; the error is that of the last one."""

    def check(value: Any, name: str) -> None:
        for number, option in enumerate(checks, 1):
            try:
                option(value, name)
                return
            except ValueError:
                if number == len(checks):
                    raise

    return check


def list_of(check: Check, most: int, least: int = 0) -> Check:
    """Return a check for lists of `least` to `most` values that all pass `check`."""

    def check_list(value: Any, name: str) -> None:
        if type(value) not in (list, tuple) or not least <= len(value) <= most:
            raise _wrong(name, value, f"a list of {least} to {most} values")
        for item in value:
            check(item, name)

    return check_list


def table_of(check: Check, most: int, longest: int = 200) -> Check:
    """Return a check for objects of at most `most` entries whose values all pass `check`. longest: length of a key."""

    def check_table(value: Any, name: str) -> None:
        if not isinstance(value, Mapping) or len(value) > most or any(len(str(key)) > longest for key in value):
            raise _wrong(name, value, f"an object of at most {most} entries")
        for key, item in value.items():
            check(item, f"{name} {repr(key[:_SHOWN])[1:-1]}")  # a key may contain newlines and terminal escapes

    return check_table


def record(fields: Mapping[str, Check], needed: Collection[str] = ()) -> Check:
    """Return a check for objects with these fields and no others. needed: fields that must be there."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(name, value, "an object")
        unknown, missing = sorted(set(value) - set(fields)), sorted(set(needed) - set(value))
        if unknown or missing:
            raise ValueError(f"{name}: unknown fields {str(unknown)[:_SHOWN]}, missing fields {missing}")
        for key, item in value.items():
            fields[key](item, key)

    return check
