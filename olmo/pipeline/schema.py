"""JSON schemas of the configuration files, and config/README.md, generated from the dataclasses.

    uv run python -m olmo.pipeline.schema   # writes them; tests/unit/test_schema.py checks them

Editors use the schemas (config/schema/*.json) to complete, explain and check the YAML. A field is
explained by its comment in the dataclass.
"""

import ast
import dataclasses
import enum
import functools
import inspect
import json
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.config.conversion import field_default, to_plain
from olmo.pipeline.recipe import EvaluationConfig, PipelineConfig, Recipe
from olmo.train.unused import HARMLESS

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
        found = expected if is_text else {"anyOf": [expected, interpolation]}
        if meaning := field_meaning(cls, field.name):
            found = {"description": meaning} | found
        properties[field.name] = found
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    made: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    return made | ({"required": required} if required else {})


def field_meaning(cls: type, name: str) -> str:
    """What is known of a field: its comment, or its section's; and whether it is ignored, and why.

    A dataclass has the fields of those that it extends.
    """
    of_classes = (field_comments(one) for one in cls.__mro__ if dataclasses.is_dataclass(one))
    comment = next((found[name] for found in of_classes if name in found), "")
    why = ignored_fields().get((cls, name))
    parts = (
        comment or section_meaning(typing.get_type_hints(cls)[name]),
        why and f"ignored: {why}",
    )
    return "; ".join(filter(None, parts))


@functools.cache
def ignored_fields() -> dict[tuple[type, str], str]:
    """(dataclass, field) → why the trainer ignores it."""
    found = {}
    for key, why in HARMLESS.items():
        *sections, name = key.split(".")
        cls: Any = TrainConfig
        for section in sections:
            hint = typing.get_type_hints(cls)[section]
            cls = next(filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))))
        found[cls, name] = why
    return found


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """Field → what its comment says: at the end of its line, or in the lines above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    found, last = {}, 0
    for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            behind = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
            above = lines[last : node.lineno - 1]
            start = max((i + 1 for i, line in enumerate(above) if not line.strip()), default=0)
            words = [line.strip().lstrip("# ") for line in (*above[start:], behind)]
            text = re.sub(r"noqa: [A-Z]+\d+ ?(\((.*)\)$)?", r"\2", " ".join(filter(None, words)))
            if text.strip():
                found[node.target.id] = text.strip()
        last = node.end_lineno or last
    return found


def format_readme() -> str:
    """config/README.md: each file, its sections and their keys."""
    parts = [README]
    for name, cls in ROOTS.items():
        parts.append(f"## {FILES[name]}\n\n{first_sentence(cls)}\n")
        for section, inner in list_sections(cls):
            parts.append(f"### `{section}`\n\n{first_sentence(inner)}\n" if section else "")
            parts.append("| key | type | default | meaning |\n|---|---|---|---|")
            parts += [format_row(inner, field) for field in dataclasses.fields(inner)]
            parts.append("")
    return "\n".join(part for part in parts if part is not None).replace("\n\n\n", "\n\n")


def list_sections(cls: Any, prefix: str = "", seen: tuple[Any, ...] = ()) -> list[tuple[str, Any]]:
    """(dotted name, dataclass) of a dataclass and of those in its fields, each once."""
    found = [(prefix, cls)]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind) and kind not in seen:
                name = f"{prefix}.{field.name}".lstrip(".")
                found += list_sections(kind, name, (*seen, cls))
    return list({inner: (name, inner) for name, inner in reversed(found)}.values())[::-1]


def first_sentence(cls: Any) -> str:
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc.split("\n\n")[0].replace("\n", " ")


def section_meaning(hint: Any) -> str:
    """What the dataclass in a type says of itself."""
    kinds = (kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind))
    return next(map(first_sentence, kinds), "")


def format_row(cls: Any, field: Any) -> str:
    """A key as a row of a table in Markdown."""
    hint = typing.get_type_hints(cls)[field.name]
    default = field_default(field)
    if default is dataclasses.MISSING:
        shown = "required"
    elif dataclasses.is_dataclass(default) or default in ({}, []):
        shown = ""
    else:
        shown = f"`{json.dumps(to_plain(default))}`"
    cells = (f"`{field.name}`", format_type(hint), shown, field_meaning(cls, field.name))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def format_type(hint: Any) -> str:
    """A type in words: "integer or null", "one of adamw, lionw", "list of text"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return "any"
    if hint in PLAIN:
        return {"string": "text"}.get(PLAIN[hint], PLAIN[hint])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(format_type, arguments))
    if origin in (list, tuple):
        return f"list of {format_type(arguments[0])}"
    if origin is dict or hint is dict:
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return "section"
    return "one of " + ", ".join(str(member.value) for member in hint)


README = """\
# Configuration

Generated from the dataclasses: `uv run python -m olmo.pipeline.schema`. An editor with a YAML
language server completes and explains these keys: the first line of each file names its schema. An
unknown key is an error that names the nearest. A value may be an interpolation of OmegaConf, as
`${oc.env:NAME}`.
"""
FILES = {
    "config": "config.yaml",
    "data": "data/DATASET.yaml",
    "eval": "eval/NAME.yaml",
    "train": "train/RUN.yaml",
}


def schema_files() -> dict[Path, str]:
    """Path → content, of each schema file and config/README.md."""
    made = {FOLDER.parent / "README.md": format_readme()}
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
