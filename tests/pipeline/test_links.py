"""A run as a chain, through the real Snakefile: each link is a job, and the end is the whole's."""

import json
from pathlib import Path

from project import Project


def test_a_chain_of_jobs_ends_as_one(tmp_path: Path, tokenizer: Path) -> None:
    project = Project(tmp_path / "project")
    project.use_given_tokenizer(tokenizer)
    same = {"train": "config/train/small.yaml", "dataset": "small"}
    project.change("config/config.yaml", runs={"small": same, "chained": same | {"links": [9, 20]}})
    project.change("config/train/small.yaml", eval_interval=100)
    project.run("checkpoints/chained/step-9")
    ended = project.run("checkpoints/small/final", "checkpoints/chained/final")
    assert ended.ran["training"] == 3  # the whole, the second link and the last
    record = json.loads((project.root / "checkpoints/chained/final/record.json").read_text())
    assert record["content"] == project.content()
    assert {"start", "after"} & record["action"]["inputs"].keys() == {"after"}
    refused = project.run("checkpoints/chained/step-10", ok=False)
    assert "expected one of the steps [9, 20]" in refused.output
