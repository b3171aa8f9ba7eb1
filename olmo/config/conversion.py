"""Convert values to the types of dataclass fields, and back; a ValueError names the wrong value."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any, Union

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SCALARS = {int: "a whole number", float: "a number", str: "text"}


class Mistakes(ValueError):
    """The wrong values of one config; `each` has a sentence for each."""

    def __init__(self, each: list[str]) -> None:
        super().__init__("; ".join(each))
        self.each = each


def each_mistake(error: Exception) -> list[str]:
    """The sentences of an error: one, or those of `Mistakes`."""
    return error.each if isinstance(error, Mistakes) else [str(error)]


@functools.cache
def field_types(cls: Any) -> dict[str, Any]:
    """Field name → type, of all public fields of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if not f.name.startswith("_")}


def is_required(f: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def field_default(f: dataclasses.Field[Any]) -> Any:
    """A field's default; dataclasses.MISSING if it is required."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def to_plain(value: Any, all_fields: bool = False) -> Any:
    """Dataclasses, enums and tuples as dicts, strings and lists. Unset extensions are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_plain(getattr(value, f.name), all_fields)
            for f in dataclasses.fields(value)
            if all_fields
            or not (f.metadata.get("extension") and getattr(value, f.name) == field_default(f))
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {k: to_plain(v, all_fields) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v, all_fields) for v in value]
    return value


def convert_value(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; `where` is the key that a ValueError names."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def error(expected: str) -> ValueError:
        return ValueError(f"{where}: expected {expected}, found {value!r}")

    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            if isinstance(option, type) and type(value) is option and value == value:
                return value
        if len(options) == 1:
            return convert_value(value, options[0], where)
        for option in options:
            if option is str and isinstance(value, (int, float)):
                continue  # else 1.5 would become "1.5" where an int or text is expected
            try:
                return convert_value(value, option, where)
            except ValueError:
                continue
        raise error(" or ".join(getattr(o, "__name__", str(o)) for o in options))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise error("a list")
        return [convert_value(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise error(f"{len(args)} values")
        return tuple(
            convert_value(v, a, f"{where}[{i}]")
            for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise error("a mapping")
        return _convert_values({str(k): (v, args[1], f"{where}.{k}") for k, v in value.items()})
    if dataclasses.is_dataclass(hint):
        return _convert_to_dataclass(value, hint, where)
    if issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise error(f"one of {', '.join(hint)}") from None
    if hint is bool:
        value = BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value
        if value not in (0, 1):
            raise error("true or false")
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise error(SCALARS[hint])
    try:
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        found = hint(value)
        if found != found:  # NaN passes every range check, and no setting may be NaN
            raise ValueError
        return found
    except (ValueError, OverflowError):
        raise error(SCALARS[hint]) from None


def unknown_key_error(key: Any, cls: Any, place: str) -> ValueError:
    """The error for a key that a dataclass lacks, with the most similar key."""
    near = difflib.get_close_matches(str(key), field_types(cls), n=1, cutoff=0.0)
    return ValueError(f"{place}: no such key in {cls.__name__}; the nearest is '{near[0]}'")


def _convert_to_dataclass(value: Any, cls: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        key = next(iter(field_types(cls)))
        raise ValueError(f"{where}: expected keys, as `{key}: …`, found {value!r}")
    hints, wrong = field_types(cls), []
    known: dict[str, tuple[Any, Any, str]] = {}
    for key, part in value.items():
        place = f"{where}.{key}" if where else str(key)
        if key in hints:
            known[key] = part, hints[key], place
        else:
            wrong.append(str(unknown_key_error(key, cls, place)))
    for f in dataclasses.fields(cls):
        if is_required(f) and f.name not in value:
            wrong.append(f"{where}: " * bool(where) + f"the key '{f.name}' is missing")
    values = _convert_values(known, wrong)
    return cls(**values)


def _convert_values(
    found: dict[str, tuple[Any, Any, str]], wrong: Sequence[str] = ()
) -> dict[str, Any]:
    """Key → (value, type, place) as key → converted value.

    Raises Mistakes, of all that are wrong, those of the caller too.
    """
    values, mistakes = {}, list(wrong)
    for key, (value, hint, where) in found.items():
        try:
            values[key] = convert_value(value, hint, where)
        except ValueError as error:
            mistakes += each_mistake(error)
    if mistakes:
        raise Mistakes(mistakes)
    return values


def default_values(cls: type) -> dict[str, Any]:
    """All fields' defaults as plain values; {} if a field is required."""
    if any(is_required(f) for f in dataclasses.fields(cls)):
        return {}
    return to_plain(cls(), all_fields=True)
