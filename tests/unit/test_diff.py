"""`olmo diff`: config, data, code and results of two runs, and of each what differs."""

import json
from pathlib import Path
from typing import Any

import pytest

from olmo.config import TrainConfig
from olmo.config.identity import identity
from olmo.report.diff import diff
from olmo.store import naming
from olmo.store.action import Action
from olmo.store.lineage import diff_actions
from olmo.store.record import Record
from olmo.store.store import Store


def put(action: Action, outputs: dict[str, Any], facts: dict[str, Any], **run: Any) -> Record:
    """The record of an action, stored; an output is a file's content, or a folder's."""

    def build(work: Path) -> dict[str, Any]:
        for name, content in outputs.items():
            files = content if isinstance(content, dict) else {"": content}
            for inner, text in files.items():
                path = work / "outputs" / name / inner
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
        return {"facts": facts, "run": run}

    return Store(Path("store")).run(action, build)


def train(name: str, keep_one_in: int, learning_rate: float, loss: float, start: str = "") -> str:
    """A finished run on a shard of documents; the digest of its weights."""
    source = put(Action("local_source", 1, {"source": 1}), {"source": "lines"}, {})
    lines = source["outputs"]["source"]["sha256"]
    documents = put(
        Action("documents", 1, {"keep_one_in": keep_one_in}, {"source": lines}),
        {"documents": f"one in {keep_one_in}"},
        {"documents": 6000 // keep_one_in, "drops": {}},
    )
    kept = documents["outputs"]["documents"]["sha256"]
    tokens = put(
        Action("tokens", keep_one_in, {}, {"documents": kept, "tokenizer": "e" * 64}),
        {"tokens": f"ids of {keep_one_in}", "index": ""},
        {"tokens": 12_000 // keep_one_in},
    )
    shard = tokens["outputs"]["tokens"]["sha256"]
    cfg = TrainConfig.new(
        model={"d_model": 32}, optimizer={"learning_rate": learning_rate}, data={"paths": [shard]}
    )
    row = {"step": 1200, "eval/heldout/CrossEntropyLoss": loss}
    cfg.save("config.yaml")
    files = {"config.yaml": Path("config.yaml").read_text(), "metrics.jsonl": json.dumps(row)}
    made = put(
        Action("training", 3, {"settings": identity(cfg)}, {"start": [start]} if start else {}),
        {"final": files | {"model.safetensors": name}},
        {"run_name": name},
        commit="abc" if start else "def",
        wall_s=75.0,
    )
    naming.link_output(Store(Path("store")), made, "final", Path("checkpoints", name, "final"))
    digest: str = made["outputs"]["final"]["files"]["model.safetensors"]["sha256"]
    return digest


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    return tmp_path


def test_only_what_differs(project: Path, capsys):
    weights = train("one", 2, 1e-3, 5.5)
    train("two", 3, 2e-3, 5.25, start=weights)
    for name, value in (("one", 0.5), ("two", 0.625)):
        folder = Path("eval", name)
        folder.mkdir(parents=True)
        row = {"scorer": "ours", "task": "quiz", "metric": "acc", "value": value, "stderr": None}
        row["documents"] = 10
        (folder / "results.json").write_text(json.dumps([row]))
    diff("one", "two")
    assert (
        capsys.readouterr().out
        == """\
one → two

config
  optimizer.learning_rate: 0.001 → 0.002
  start_from: none → one

data
  documents.documents: 3,000 → 2,000
  documents.keep_one_in: 2 → 3
  tokens.tokens: 6,000 → 4,000

code
  commit: def → abc
  stages.tokens: 2 → 3

results
  eval/heldout/CrossEntropyLoss: 5.5000 → 5.2500
  evaluation.quiz acc (ours): 0.5000 → 0.6250
"""
    )
    diff("one", "checkpoints/one/final")
    assert capsys.readouterr().out == "one and checkpoints/one/final do not differ\n"


def test_a_section_that_only_one_has_is_told_field_by_field():
    one, other = {"clip": {"norm": 1.0, "by": {"ratio": 2}}}, {"seed": 3}
    told = ["clip.by.ratio: 2 → none", "clip.norm: 1.0 → none", "seed: none → 3"]
    assert diff_actions(one, other, missing="none") == told


def test_a_run_that_is_not_finished(project: Path, capsys):
    train("one", 2, 1e-3, 5.5)
    work = Path("store/work/key/attempt")
    work.mkdir(parents=True)
    text = Path("checkpoints/one/final/config.yaml").read_text()
    assert "load_path: null" in text
    (work / "config.yaml").write_text(text.replace("load_path: null", "load_path: /elsewhere"))
    (work / "metrics.jsonl").write_text('{"step": 7}\n')
    naming.symlink_atomic(Store(Path("store")), Path("checkpoints/two/run"), work)
    diff("one", "two")
    told = capsys.readouterr().out
    assert "config\n" not in told and "data\n" not in told
    assert "  steps: 1,200 → 7\n  time: 1:15 → none\n" in told
