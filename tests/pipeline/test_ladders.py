"""A ladder through the real Snakefile: trunks are trained once, and tables say what records say."""

import json
from pathlib import Path
from typing import Any

from project import Project

SIZES = {f"d{width}": [f"model.d_model={width}"] for width in (8, 16, 24, 32)}
LADDER = {
    "train": "config/train/small.yaml",
    "dataset": "small",
    "sizes": SIZES,
    "budgets": ["6144T", "12288T"],  # 12 and 24 steps
    "held_out": "d32",
    "decay_share": 0.25,
}


def record(project: Project, run: str, place: str = "final") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (project.root / f"checkpoints/{run}/{place}/record.json").read_text()
    )
    return found


def test_a_ladder_trains_each_trunk_once(tmp_path: Path, tokenizer: Path) -> None:
    project = Project(tmp_path / "project")
    project.use_given_tokenizer(tokenizer)
    project.change("config/train/small.yaml", eval_interval=100, save_interval_unsharded=None)
    # The longer run of a size, in one piece.
    scratch = {
        **{"train": "config/train/small.yaml", "dataset": "small"},
        "overrides": [
            *("model.d_model=16", "max_duration=24", "scheduler.t_decay=6"),
            "scheduler.name=warmup_stable_decay",
        ],
    }
    project.change("config/config.yaml", ladders={"mini": LADDER}, runs={"scratch": scratch})
    ended = project.run("ladder/mini/check.md", "checkpoints/scratch/final")
    # Of each size: the trunk to step 9 and on to 18, and two decays; the other's step 9 is found.
    assert (ended.ran["training"], ended.found["training"]) == (4 * 4 + 1, 4)
    assert record(project, "scratch")["content"] == record(project, "mini-d16-12288T")["content"]
    shared = [record(project, f"mini-d16-{b}", "step-9") for b in LADDER["budgets"]]
    assert shared[0]["key"] == shared[1]["key"] and shared[0]["facts"]["steps"] == 9

    said = json.loads((project.root / "ladder/mini/prediction.json").read_text())
    prediction = (project.root / "ladder/mini/prediction.md").read_text()
    assert [one["run"] for one in said["trained"]] == [
        f"mini-{size}-{budget}" for size in ("d8", "d16", "d24") for budget in LADDER["budgets"]
    ]
    for one in said["trained"]:
        facts = record(project, one["run"])["facts"]
        assert one["loss"] == facts["heldout_loss"]["heldout"]["last"]
        assert one["tokens"] == facts["tokens"] and f"{one['loss']:.4f}" in prediction
    assert "shared trunks saved 13,824, 25%" in prediction  # 9 of 36 steps, of three sizes
    checked = (project.root / "ladder/mini/check.md").read_text()
    for one in said["predicted"]:
        loss = record(project, one["run"])["facts"]["heldout_loss"]["heldout"]["last"]
        word = "held" if one["low"] <= loss <= one["high"] else "failed"
        line = next(line for line in checked.splitlines() if line.startswith(f"| {one['run']} "))
        assert f"| {loss:.4f} |" in line and line.endswith(f"| {word} |")
    assert (project.root / "ladder/mini/check.svg").read_text().startswith("<svg")

    assert not project.run("ladder/mini/check.md").ran
    # Another short run leaves the trunk at step 12: the longer one stays as it is.
    before = record(project, "mini-d16-12288T")["key"]
    project.change("config/config.yaml", ladders__mini__budgets=["8192T", "12288T"])
    both = [f"checkpoints/mini-d16-{budget}/final" for budget in ("8192T", "12288T")]
    changed = project.run(*both)
    assert record(project, "mini-d16-12288T")["key"] == before
    assert changed.logs.count("steps 1 to 18: taken over from") == 1
    assert changed.ran["training"] == 3  # a link and a decay; and the link that is taken over

    # More tokens than an epoch has: refused before anything is trained.
    project.change("config/config.yaml", ladders__mini__budgets=["8192T", "1e9T"])
    refused = project.run("checkpoints/mini-d8-8192T/final", ok=False)
    assert "steps of the ladder's longest run" in refused.output and not refused.ran["training"]
