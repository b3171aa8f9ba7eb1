"""JSON schemas of the configuration files, generated from the dataclasses: config/schema/*.json.

    uv run python -m olmo.pipeline.schema   # writes them; tests/unit/test_schema.py checks them

Editors use them to complete and check the YAML.
"""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.pipeline.recipe import EvaluationConfig, PipelineConfig, Recipe

FOLDER = Path(__file__).parents[2] / "config" / "schema"
ROOTS = {"config": PipelineConfig, "data": Recipe, "eval": EvaluationConfig, "train": TrainConfig}
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema(hint: Any) -> dict[str, Any]:
    """The schema of a type: a dataclass, an enum, a list, a dict, a union, a plain value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema(argument) for argument in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": schema(arguments[0]) if origin is list else {}}
    if origin is dict or hint is dict:
        return {"type": "object", "additionalProperties": schema(arguments[1]) if arguments else {}}
    if dataclasses.is_dataclass(hint):
        return dataclass_schema(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    raise TypeError(f"no schema for {hint!r}")


def dataclass_schema(cls: Any) -> dict[str, Any]:
    """The schema of a dataclass. Unknown properties are errors, as when the file is loaded.

    Every property may be a string with "${", which OmegaConf resolves to a value of any type.
    """
    hints = typing.get_type_hints(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        expected = schema(hints[field.name])
        interpolation = {"type": "string", "pattern": r"\$\{"}
        is_text = expected.get("type") == "string" or not expected
        properties[field.name] = expected if is_text else {"anyOf": [expected, interpolation]}
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    made: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    return made | ({"required": required} if required else {})


def schema_files() -> dict[Path, str]:
    """Path → content, of each schema file."""
    made = {}
    for name, cls in ROOTS.items():
        root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__}
        text = json.dumps(root | schema(cls), indent=1, sort_keys=True)
        made[FOLDER / f"{name}.json"] = text + "\n"
    return made


def main() -> None:
    for path, text in schema_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
