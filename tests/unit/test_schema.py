"""The schema files are what the dataclasses say, and say yes to every config we ship."""

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from olmo.config import DataConfig, TrainConfig
from olmo.corpus.documents import DocumentsSection
from olmo.corpus.sources import SourcesSection
from olmo.pipeline.schema import FOLDER, ROOTS, field_meaning, schema, schema_files

CONFIG = FOLDER.parent


def test_the_files_are_in_step():
    for path, text in schema_files().items():
        assert path.read_text() == text, "run: uv run python -m olmo.pipeline.schema"


@pytest.mark.slow
def test_editors_know_the_schema_of_each_file():
    # Of bench each file has its own, and lm-eval has none for its tasks.
    files = [p for p in CONFIG.rglob("*.yaml") if not {"bench", "tasks"} & set(p.parts)]
    for path in files:
        first, schema_path = path.read_text().splitlines()[0].split("=")
        assert first == "# yaml-language-server: $schema", path
        assert (path.parent / schema_path).resolve() in schema_files(), path
    assert len(files) > 12


def test_every_key_is_explained():
    rows = [line for line in (CONFIG / "README.md").read_text().splitlines() if "| `" in line[:3]]
    assert len(rows) > 200
    assert [row for row in rows if len(row.split(" | ")[3].strip(" |")) < 5] == []


def test_comments_are_read_whole_and_of_inherited_fields_too():
    assert field_meaning(DocumentsSection, "max_line_bytes").endswith("dropped (long-line)")
    assert field_meaning(SourcesSection, "text_field") == "that has the text"
    assert field_meaning(TrainConfig, "cross_entropy") == "None: chunked"
    assert field_meaning(DataConfig, "timeout").endswith("0: any; ignored: a thread prefetches")
    assert (
        field_meaning(TrainConfig, "model")
        == "The shape of the model, and how its weights are drawn."
    )


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
