"""The schema files are what the dataclasses say, and say yes to every config we ship."""

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from olmo.pipeline.schema import FOLDER, ROOTS, schema, schema_files

CONFIG = FOLDER.parent


def test_the_files_are_in_step():
    for path, text in schema_files().items():
        assert path.read_text() == text, "run: uv run python -m olmo.pipeline.schema"


@pytest.mark.parametrize(
    ("root", "path"),
    [("config", CONFIG / "config.yaml")]
    + [("data", path) for path in sorted((CONFIG / "data").glob("*.yaml"))]
    + [("train", path) for path in sorted((CONFIG / "train").glob("*.yaml"))],
    ids=lambda value: value if isinstance(value, str) else Path(value).name,
)
def test_our_own_files_follow_them(root: str, path: Path):
    validator = Draft202012Validator(schema(ROOTS[root]))
    content = yaml.safe_load(path.read_text())
    assert [error.message for error in validator.iter_errors(content)] == []
    assert list(validator.iter_errors(content | {"no_such_key": 1}))
