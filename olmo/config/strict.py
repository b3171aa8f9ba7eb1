"""Dataclasses read from YAML strictly: what does not fit is an error that says where and why.

OmegaConf resolves `${interpolations}` and overrides; the types are checked here, since OmegaConf
makes a node of every value and takes minutes for thousands of data paths.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self, Union

import yaml

from olmo.runtime.urls import entrusted

Place = tuple[str | int, ...]  # keys and numbers that lead to a value in a config


class BaseConfig:
    """Typed construction (`ModelConfig(block_type="llama")`), strict loading, saving."""

    # Which values the environment decided when this was loaded: place → (its text, the value).
    from_environment: ClassVar[dict[Place, tuple[str, Any]]] = {}

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            setattr(self, name, _typed(entrusted(getattr(self, name)), hint, name))

    @classmethod
    def new(cls, **values: Any) -> Self:
        """The config with `values` in place of the defaults; nested ones may be dictionaries."""
        return _typed(values, cls, "")

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Iterable[str] | None = None,
        key: str | None = None,
        validate_paths: bool = True,
        foreign: bool = False,
    ) -> Self:
        """Read a YAML file, with `--a.b=value` or `a.b=value` overrides; a bare flag means true.

        A mapping given as a value changes the keys that it names, a list replaces the whole one.
        `key` picks one section of the file (`ModelConfig.load(path, key="model")`).
        `validate_paths=False` lets ${path.glob:…} and ${path.choose:…} find nothing.
        A `foreign` config, which came with a checkpoint or from a URL, learns nothing of this
        machine but OLMO_STORE: of ${oc.env:NAME,default} it gets the default, and ${oc.env:NAME},
        ${path.glob:…} and their kin stay text in it.

        Raises ValueError for what cannot be read, unknown keys and values of the wrong type,
        FileNotFoundError for a missing file.
        """
        raw = read_yaml(path)
        raw = {} if raw is None else raw
        if key is not None and isinstance(raw, dict):
            if key not in raw:
                raise ValueError(
                    f"{path} has no section '{key}'; it has {', '.join(map(str, raw))}"
                )
            raw = raw[key]
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a mapping of keys, found {type(raw).__name__}")
        plain: Any = {}
        told: dict[Place, str] = {}
        try:
            plain, told = _resolve(cls, raw, overrides or (), validate_paths, foreign)
            config = _typed(cls.update_legacy_settings(plain), cls, "")
        except (ValueError, RecursionError) as error:
            said = str(error)
            for place, text in told.items():  # what the environment says may be a secret
                value = _at(plain, place)
                if value is not None and len(str(value)) > 3:  # a shorter one is in every sentence
                    said = said.replace(str(value), text)
            hint = "; a config from elsewhere reads nothing of this machine: write the value"
            raise ValueError(f"{path}: {said}{hint * (foreign and '${' in said)}") from None
        whole = as_plain(config, everything=True)
        config.from_environment = {
            place: (text, value)
            for place, text in told.items()
            if (value := _at(whole, place)) is not None
        }
        return config

    @classmethod
    def update_legacy_settings(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Values that older OLMo configs spell differently."""
        return plain

    def save(self, path: str | Path) -> None:
        """Write YAML that `load` reads back to an equal object."""
        Path(path).write_text(to_yaml(self.as_written()), encoding="utf-8")

    def asdict(self, exclude: Iterable[str] | None = None) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers. What is ours is there only if used."""
        left_out = set(exclude or ())
        return {k: v for k, v in as_plain(self).items() if k not in left_out}

    def as_written(self, exclude: Iterable[str] | None = None) -> dict[str, Any]:
        """`asdict` for a file: ${oc.env:…} in the place of what the environment said, which may be
        a secret, and what only looks like an interpolation escaped."""

        def written(value: Any, place: Place) -> Any:
            text, found = self.from_environment.get(place, ("", None))
            if found is not None and found == value:
                return text
            if isinstance(value, dict):
                return {k: written(v, (*place, k)) for k, v in value.items()}
            if isinstance(value, list):
                return [written(v, (*place, i)) for i, v in enumerate(value)]
            return _escaped(value) if isinstance(value, str) else value

        plain: dict[str, Any] = written(self.asdict(exclude), ())
        return plain

    def update_with(self, **values: Any) -> Self:
        """A copy with some fields changed. Raises ValueError for a field that there is not."""
        changed = copy.deepcopy(self)
        for name, value in values.items():
            if name not in _hints(type(self)):  # type: ignore[arg-type]
                raise _no_such_key(name, type(self), name)
            setattr(changed, name, value)
        return changed


def check_range(name: str, found: float | None, least: float, most: float = math.inf) -> None:
    """Raises ValueError for a number outside [least, most]; None is one that was not given."""
    if found is not None and not least <= found <= most:
        wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}: expected {wanted}, found {found}")


def ours(default: Any = None) -> Any:
    """A field OLMo does not have: absent from saved configs until used, so that OLMo reads them."""
    return field(default=default, metadata={"ours": True})


# Of a field of a stage's section that is no part of what an action is known by.
UNHASHED = {"unhashed": True}


def changed(config: BaseConfig) -> dict[str, Any]:
    """The fields of a config that are not their defaults."""
    return {
        f.name: as_plain(value)
        for f in dataclasses.fields(config)  # type: ignore[arg-type]
        if (value := getattr(config, f.name)) != default_of(f)
    }


def hashed(config: BaseConfig) -> dict[str, Any]:
    """Those of them that decide bytes, for an action."""
    free = {f.name for f in dataclasses.fields(config) if f.metadata.get("unhashed")}  # type: ignore[arg-type]
    return {name: value for name, value in changed(config).items() if name not in free}


# Of a config. YAML's aliases make billions of values of a few lines.
MOST_VALUES, MOST_LEVELS = 1_000_000, 50


def _check_count(found: int) -> None:
    if found > MOST_VALUES:
        raise ValueError(f"expected at most {MOST_VALUES:,} values, found more")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with 1e-4 read as a number, dates left as text, and a repeated key refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node.value, str):
                raise yaml.constructor.ConstructorError(
                    None, None, "expected a text as the key", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key '{key_node.value}' is there twice",
                    key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    depth = 0

    def descend_resolver(self, node: Any, index: Any) -> None:
        self.depth += 1
        if self.depth > MOST_LEVELS:  # the parser in C would end the process, without a word
            raise yaml.YAMLError(f"expected at most {MOST_LEVELS} levels, found more")
        super().descend_resolver(node, index)

    def ascend_resolver(self) -> None:
        self.depth -= 1
        super().ascend_resolver()

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        _check_count(len(node.value))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float"))]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?"


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Puts in quotes what is text and what the loader would take for a number: '1e-4'."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(rf"^({_FLOAT}|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"),
        list("-+0123456789."),
    )


def _resolve(
    cls: type, raw: dict[str, Any], overrides: Iterable[str], validate_paths: bool, foreign: bool
) -> tuple[dict[str, Any], dict[Place, str]]:
    """Overrides and ${interpolations}, by OmegaConf; and the texts that the environment decides.

    OmegaConf makes a node of every value, which takes minutes for thousands of data paths. Long
    lists without interpolations therefore wait outside, behind one placeholder each.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from olmo.config.resolvers import resolvers

    waiting: dict[str, list[Any]] = {}
    count = 0

    def lift(value: Any) -> Any:
        nonlocal count
        count += len(value) if isinstance(value, dict | list) else 0
        _check_count(count)
        if isinstance(value, dict):
            return {k: lift(v) for k, v in value.items()}
        if isinstance(value, list):
            if len(value) > 32 and all(isinstance(v, str) and "${" not in v for v in value):
                placeholder = f"<list {len(waiting)} set aside while resolving>"
                waiting[placeholder] = value
                return placeholder
            return [lift(v) for v in value]
        return value

    def put_back(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: put_back(v) for k, v in value.items()}
        if isinstance(value, list):
            return [put_back(v) for v in value]
        return waiting.get(value, value) if isinstance(value, str) else value

    try:
        # The defaults take part, since ${save_interval} may mean one that the file does not set.
        tree = OmegaConf.merge(OmegaConf.create(_defaults(cls)), OmegaConf.create(lift(raw)))
        for override in overrides:
            name, given, value = override.lstrip("-").partition("=")
            try:
                parsed = yaml.load(value, _Loader) if given else True
            except yaml.YAMLError as error:
                raise ValueError(f"cannot read the value of --{name}={value}: {error}") from error
            name = name.replace("-", "_")
            # Values such as ${a.b} stay text here and are resolved with the rest.
            # A mapping joins the section that is there, as in OLMo; all else replaces.
            OmegaConf.update(tree, name, parsed, merge=isinstance(parsed, dict), force_add=True)
        told: dict[Place, str] = {}
        with resolvers(validate_paths, foreign) as (read, withheld):
            for place, text in list(_interpolated(OmegaConf.to_container(tree), ())):
                read.clear()
                withheld.clear()
                *path, last = place
                node: Any = functools.reduce(operator.getitem, path, tree)  # type: ignore[arg-type]
                try:
                    value = node[last]
                    if OmegaConf.is_config(value):
                        OmegaConf.to_container(value, resolve=True)
                except OmegaConfBaseException:
                    if not withheld:
                        raise
                    node[last] = _escaped(text)
                if read:
                    told[place] = text
            plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        return put_back(plain), told
    except OmegaConfBaseException as error:
        reason, key = str(error).partition("\n")[0], getattr(error, "full_key", None)
        reason = reason.rpartition(" raised while resolving interpolation: ")[2]
        raise ValueError(f"{key}: {reason}; give --{key}=…" if key else reason) from error


def _interpolated(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    """The texts with ${…} in a tree, and where they are."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _interpolated(inner, (*place, key))
    elif isinstance(value, str) and "${" in value:
        yield place, value


def _escaped(text: str) -> str:
    """What OmegaConf reads as this very text."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def _at(value: Any, place: Place) -> Any:
    """What is at a place; None where a config has no such place."""
    try:
        return functools.reduce(operator.getitem, place, value)
    except (KeyError, IndexError, TypeError):
        return None


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if not f.name.startswith("_")}


def _defaults(cls: type) -> dict[str, Any]:
    if any(_is_required(f) for f in dataclasses.fields(cls)):
        return {}
    return as_plain(cls(), everything=True)


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def default_of(f: dataclasses.Field[Any]) -> Any:
    """A field's value where nothing is given; MISSING where it must be."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def as_plain(value: Any, everything: bool = False) -> Any:
    """Dataclasses, enumerations and tuples as what JSON and YAML know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: as_plain(getattr(value, f.name), everything)
            for f in dataclasses.fields(value)
            if everything
            or not (f.metadata.get("ours") and getattr(value, f.name) == default_of(f))
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {k: as_plain(v, everything) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(v, everything) for v in value]
    return value


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; ValueError where it is unreadable or has a key twice."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        with open(path, encoding="utf-8") as stream:
            return yaml.load(stream, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise ValueError(f"{path} is not readable as YAML: {reason}") from error


def to_yaml(plain: dict[str, Any]) -> str:
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ValueError naming `where`, what was expected and found."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def refuse(expected: str) -> ValueError:
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
            return _typed(value, options[0], where)
        for option in options:
            if option is str and isinstance(value, (int, float)):
                continue  # else a number that is not whole would pass as text
            try:
                return _typed(value, option, where)
            except ValueError:
                continue
        raise refuse(" or ".join(getattr(o, "__name__", str(o)) for o in options))
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise refuse("a list")
        return [_typed(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise refuse(f"{len(args)} values")
        return tuple(
            _typed(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise refuse("a mapping")
        return {str(k): _typed(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _typed_dataclass(value, hint, where)
    if issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise refuse(f"one of {', '.join(hint)}") from None
    if hint is bool:
        if isinstance(value, str) and value.lower() in (
            "true",
            "yes",
            "on",
            "false",
            "no",
            "off",
        ):
            return value.lower() in ("true", "yes", "on")
        if value not in (0, 1):
            raise refuse("true or false")
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise refuse({int: "a whole number", float: "a number", str: "text"}[hint])
    try:
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        found = hint(value)
        if found != found:  # NaN, which no setting can be and every comparison lets pass
            raise ValueError
        return found
    except (ValueError, OverflowError):
        raise refuse("a whole number" if hint is int else "a number") from None


def _no_such_key(key: Any, cls: Any, place: str) -> ValueError:
    near = difflib.get_close_matches(str(key), _hints(cls), n=1, cutoff=0.0)
    return ValueError(f"{place}: no such key in {cls.__name__}; the nearest is '{near[0]}'")


def _typed_dataclass(value: Any, cls: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected the keys of a {cls.__name__}, found {value!r}")
    hints, values = _hints(cls), {}
    for key, part in value.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise _no_such_key(key, cls, place)
        values[key] = _typed(part, hints[key], place)
    for f in dataclasses.fields(cls):
        if _is_required(f) and f.name not in values:
            raise ValueError(f"{where}: " * bool(where) + f"the key '{f.name}' is missing")
    return cls(**values)
