"""`olmo store affected` names what the real Snakefile makes again, and its commands do that."""

import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from project import Project, documents, write_source

from olmo.store import naming
from olmo.store.lineage import ancestors, records_by_content
from olmo.store.store import Store

ORDER = "checkpoints/small/global_indices.npy"  # made from the number of instances, not of bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has run."""
    project = Project(tmp_path_factory.mktemp("affected") / "project")
    project.run()
    return project


def names(project: Project) -> dict[str, str]:
    """Each name of the project and the key of its action."""
    store = Store(project.store)
    return {
        os.path.relpath(name["path"], project.root): name["key"]
        for _, name in naming.all_names(store)
    }


def listed(project: Project, said: str) -> set[str]:
    """All names of the actions that the command listed, of which it shows one each."""
    by_name = names(project)
    first = set(re.findall(r"^((?:data|checkpoints)/\S+) .*@\d", said, re.M))
    keys = {by_name[name] for name in first}
    return {name for name, key in by_name.items() if key in keys}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name, key in after.items() if before.get(name) != key} - {ORDER}


def run_commands(project: Project, said: str) -> tuple[list[str], list[str]]:
    """Run the command's `rm`, if it has one; the paths, and snakemake's targets."""
    lines = [shlex.split(line) for line in said.partition("To make them again:")[2].splitlines()]
    removed = next((words[2:] for words in lines if words[:2] == ["rm", "-rf"]), [])
    subprocess.run(["rm", "-rf", *removed], cwd=project.root, check=True)
    (targets,) = (words[5:] for words in lines if words[:3] == ["uv", "run", "snakemake"])
    return removed, targets


def test_a_changed_source(made: Project, tmp_path: Path) -> None:
    project = made.copy(tmp_path / "project")
    said, before = (
        project.olmo("store", "affected", "sources/part-1.json.gz").output,
        names(project),
    )
    text = [one | {"text": one["text"] + " changed"} for one in documents(1)]
    write_source(project.root / "sources/part-1.json.gz", text)
    project.run(*run_commands(project, said)[1])
    assert changed(before, names(project)) == listed(project, said)
    assert "part-0.json.gz" not in said and "checkpoints/small/final" in said
    # The records of before have lost their names, and still tell what they were made from.
    again = project.olmo("store", "affected", "local_source@1").output
    assert "(no path)" in again and "training@3" in again


def test_another_tokenizer(made: Project, tmp_path: Path) -> None:
    project = made.copy(tmp_path / "project")
    said, before = (
        project.olmo("store", "affected", "data/small/tokenizer.json").output,
        names(project),
    )
    project.change("config/data/small.yaml", tokenizer__train_vocab_size=500)
    project.change("config/train/small.yaml", model__vocab_size=500)
    project.run()
    assert changed(before, names(project)) == listed(project, said)


def test_a_new_version_of_a_stage(
    made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage `documents` gets the next number, in every process, and other bytes."""
    project = made.copy(tmp_path / "project")
    said, before = project.olmo("store", "affected", "documents@1").output, names(project)
    store = Store(project.store)
    made_by = records_by_content(store)
    for name, key in before.items():
        record = store.record(key)
        assert record is not None
        stages = {one["action"]["stage"] for _, one in ancestors(store, record, made_by)}
        assert (name in listed(project, said)) == ("documents" in stages), name
    bump = tmp_path / "bump"
    bump.mkdir()
    (bump / "sitecustomize.py").write_text(
        "import olmo.store.stage as s\n"
        "first = s.Stage.__init__\n"
        "def init(self, build, number, conditions):\n"
        "    first(self, build, number + (build.__name__ == 'documents'), conditions)\n"
        "s.Stage.__init__ = init\n"
    )
    environment = project.environment()
    environment["PYTHONPATH"] = f"{bump}{os.pathsep}{environment['PYTHONPATH']}"
    monkeypatch.setattr(project, "environment", lambda: environment)
    ran = project.run(*run_commands(project, said)[1]).ran
    assert ran["documents"] == 3, "the removed names are noticed"
    after = names(project)
    again = {name for name, key in after.items() if before[name] != key}
    # The bytes are the same, and so nothing after them runs.
    assert again and again < listed(project, said)
    assert {Path(name).parent.as_posix() for name in again} == {
        "data/small/documents",
        "data/small/heldout",
    }
    assert ran == Counter(documents=3)


def test_the_same_action_again(made: Project, tmp_path: Path) -> None:
    project = made.copy(tmp_path / "project")
    said = project.olmo("store", "affected", "data/small/tokens/part-2.npy").output
    removed, targets = run_commands(project, said)
    assert len(removed) == 3 and targets == ["checkpoints/small/final"]
    assert project.run(*targets).ran == Counter(tokens=1)
