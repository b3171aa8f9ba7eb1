"""`olmo check`: all mistakes of all configs at once, each with its file and line."""

from pathlib import Path

import pytest
from project import Project

from olmo.pipeline.check import check


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path / "project")
    monkeypatch.chdir(project.root)
    return project


def found(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of mistakes, and the sentence that ends the command."""
    with pytest.raises(ValueError) as ended:
        check()
    return [*capsys.readouterr().err.splitlines(), str(ended.value)]


def test_each_file_without_a_mistake_is_a_line(project: Project, capsys):
    check()
    assert capsys.readouterr().out.splitlines() == [
        "config/config.yaml: ok",
        "config/data/small.yaml: ok",
        "run small: ok",
    ]


def test_all_mistakes_at_once_with_their_lines(project: Project, capsys):
    train = project.root / "config/train/small.yaml"
    text = train.read_text().replace("d_model: 32", "d_modle: 32").replace("seed: 6198", "seed: x")
    train.write_text(text.replace("n_layers: 2", "n_layers: two"))
    recipe = project.root / "config/data/small.yaml"
    recipe.write_text(recipe.read_text().replace("keep_one_in: 2", "keep_one_in: 0"))
    other = project.root / "config/data/other.yaml"
    other.write_text("sources:\n  files: [missing/*.gz]\n")
    lines = {
        key: number
        for number, line in enumerate(train.read_text().splitlines(), 1)
        for key in [line.split(":")[0].strip()]
    }
    name = "config/train/small.yaml"
    *mistakes, last = found(capsys)
    assert mistakes == [
        "config/data/other.yaml: the key 'tokenizer' is missing",
        "config/data/small.yaml:5: documents.keep_one_in: expected at least 1, found 0",
        f"{name}:{lines['seed']}: seed: expected a whole number, found 'x'",
        f"{name}:{lines['d_modle']}: model.d_modle: no such key in ModelConfig; the nearest is "
        "'d_model'",
        f"{name}:{lines['n_layers']}: model.n_layers: expected a whole number, found 'two'",
    ]
    assert last == "found 5 mistakes; correct what the lines above name, then check again"


def test_mistakes_of_runs(project: Project, capsys):
    run = project.read("config/config.yaml")["runs"]["small"]
    runs = {
        "small": run,
        "no-recipe": run | {"dataset": "nothing"},
        "no-config": run | {"train": "config/train/nothing.yaml"},
        "override": run | {"overrides": ["model.n_heads=5"]},
        "vocabulary": run | {"overrides": ["model.vocab_size=100"]},
    }
    project.change("config/config.yaml", runs=runs)
    mistakes = found(capsys)
    assert [line.split(": ")[0] for line in mistakes[:-1]] == [
        "run no-recipe",
        "config/config.yaml:10",
        "config/train/small.yaml:3",
        "config/train/small.yaml:17",
    ]
    assert "expected the recipe config/data/nothing.yaml, found none; known are" in mistakes[0]


def test_the_files_are_checked_if_the_config_cannot_be_read(project: Project, capsys):
    project.change("config/config.yaml", runs__small__datasat="small", eval=["small"])
    project.change("config/train/small.yaml", seed="x")
    assert [line.split(": ")[:2] for line in found(capsys)[:-1]] == [
        ["config/config.yaml:6", "runs.small.datasat"],
        ["config/train/small.yaml:1", "seed"],
    ]
    project.change("config/config.yaml", runs={}, eval=["smal"])
    assert "eval: expected a run or a soup, found smal" in found(capsys)[0]


def test_another_folder(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project.root / "config")
    with pytest.raises(ValueError, match=r"expected config/config.yaml in .*, found none; cd /"):
        check()
