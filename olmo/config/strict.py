"""Dataclasses loaded strictly from YAML: a value that does not fit is an error that names its key.

OmegaConf resolves `${interpolations}` and overrides. Types are checked here, since OmegaConf makes
a node of every value and takes minutes for thousands of data paths.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Iterable
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Self

from olmo.config.conversion import (
    Mistakes,
    convert_value,
    each_mistake,
    field_default,
    field_types,
    to_plain,
    unknown_key_error,
)
from olmo.config.interpolation import KeyPath, escape, get_at, resolve_config
from olmo.config.yaml_io import read_yaml, require_keys, to_yaml
from olmo.runtime.urls import stash_secrets


class BaseConfig:
    """Typed construction (`ModelConfig(block_type="llama")`), strict loading, saving."""

    # Values that came from environment variables at loading: key path → (text in the file, value).
    from_environment: ClassVar[dict[KeyPath, tuple[str, Any]]] = {}

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():  # type: ignore[arg-type]
            setattr(self, name, convert_value(stash_secrets(getattr(self, name)), hint, name))

    @classmethod
    def new(cls, **values: Any) -> Self:
        """The config with `values` in place of the defaults; nested ones may be dictionaries."""
        return convert_value(values, cls, "")

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Iterable[str] | None = None,
        key: str | None = None,
        validate_paths: bool = True,
        untrusted: bool = False,
    ) -> Self:
        """Read a YAML file, with `--a.b=value` or `a.b=value` overrides; a bare flag means true.

        A mapping as a value is merged into the section, a list replaces the list.

        Args:
            key: load one section of the file (`ModelConfig.load(path, key="model")`).
            validate_paths: False lets ${path.glob:…} and ${path.choose:…} match nothing.
            untrusted: the config came with a checkpoint or from a URL, and may read nothing of this
                machine but OLMO_STORE: ${oc.env:NAME,default} is the default, and ${oc.env:NAME},
                ${path.glob:…} and the like stay text.

        Raises:
            ValueError: unreadable YAML, an unknown key or a value of the wrong type.
            FileNotFoundError: the file is missing.
        """
        raw = read_yaml(path)
        if key is not None and isinstance(raw, dict):
            if key not in raw:
                raise ValueError(
                    f"{path}: expected the section '{key}', found {', '.join(map(str, raw))}"
                )
            raw = raw[key]
        raw = require_keys(raw, path)
        plain: Any = {}
        from_environment: dict[KeyPath, str] = {}
        try:
            plain, from_environment = resolve_config(
                cls, raw, overrides or (), validate_paths, untrusted
            )
            config = convert_value(cls.update_legacy_settings(plain), cls, "")
        except (ValueError, RecursionError) as error:
            hint = "; a config from elsewhere reads nothing of this machine: write the value"
            mistakes = []
            for message in each_mistake(error):
                for place, text in from_environment.items():  # the value may be a secret
                    value = get_at(plain, place)
                    if value is not None and len(str(value)) > 3:  # shorter: part of a word
                        message = message.replace(str(value), text)
                mistakes.append(f"{path}: {message}{hint * (untrusted and '${' in message)}")
            raise Mistakes(mistakes) from None
        plain = to_plain(config, all_fields=True)
        config.from_environment = {
            place: (text, value)
            for place, text in from_environment.items()
            if (value := get_at(plain, place)) is not None
        }
        return config

    @classmethod
    def update_legacy_settings(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Convert keys and values of older OLMo configs."""
        return plain

    def save(self, path: str | Path) -> None:
        """Write YAML that `load` reads back to an equal object."""
        Path(path).write_text(to_yaml(self.asdict_for_saving()), encoding="utf-8")

    def asdict(self, exclude: Iterable[str] | None = None) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers; extensions only if they are set."""
        excluded = set(exclude or ())
        return {k: v for k, v in to_plain(self).items() if k not in excluded}

    def asdict_for_saving(self, exclude: Iterable[str] | None = None) -> dict[str, Any]:
        """`asdict` for a file: values of environment variables, which may be secrets, are written
        as ${oc.env:…}, and text that looks like an interpolation is escaped."""

        def unresolve(value: Any, place: KeyPath) -> Any:
            text, found = self.from_environment.get(place, ("", None))
            if found is not None and found == value:
                return text
            if isinstance(value, dict):
                return {k: unresolve(v, (*place, k)) for k, v in value.items()}
            if isinstance(value, list):
                return [unresolve(v, (*place, i)) for i, v in enumerate(value)]
            return escape(value) if isinstance(value, str) else value

        plain: dict[str, Any] = unresolve(self.asdict(exclude), ())
        return plain

    def update_with(self, **values: Any) -> Self:
        """A copy with some fields changed. Raises ValueError for an unknown field."""
        changed = copy.deepcopy(self)
        for name, value in values.items():
            if name not in field_types(type(self)):  # type: ignore[arg-type]
                raise unknown_key_error(name, type(self), name)
            setattr(changed, name, value)
        return changed


def check_range(name: str, found: float | None, least: float, most: float = math.inf) -> None:
    """Raises ValueError for a number outside [least, most]; None is not checked."""
    if found is not None and not least <= found <= most:
        expected = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}: expected {expected}, found {found}")


def check_one_set(name: str, section: Any, fields: Collection[str]) -> None:
    """Raises ValueError unless exactly one of these fields of a section is set."""
    found = [key for key in fields if getattr(section, key)]
    if len(found) != 1:
        expected = ", ".join(fields)
        raise ValueError(
            f"{name}: expected one of {expected}; found {' and '.join(found) or 'none'}"
        )


def extension(default: Any = None) -> Any:
    """A field that OLMo lacks. Saved only if it is set, since OLMo refuses unknown keys."""
    return field(default=default, metadata={"extension": True})


# Metadata of a field of a stage's section that is not in the action's key.
UNHASHED = {"unhashed": True}


def non_default_fields(config: BaseConfig) -> dict[str, Any]:
    """The fields of a config that differ from their defaults."""
    return {
        f.name: to_plain(value)
        for f in dataclasses.fields(config)  # type: ignore[arg-type]
        if (value := getattr(config, f.name)) != field_default(f)
    }


def hashed_fields(config: BaseConfig) -> dict[str, Any]:
    """The fields that differ from their defaults and are in the action's key."""
    unhashed = {f.name for f in dataclasses.fields(config) if f.metadata.get("unhashed")}  # type: ignore[arg-type]
    return {
        name: value for name, value in non_default_fields(config).items() if name not in unhashed
    }
