"""From a folder of one's own files to a checkpoint and a chat, each command printed by the last."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import polars
import pyarrow
import pytest
from project import Outcome, Project, documents

IN_PROCESSES = True  # see conftest.py
TEXTS = [document["text"] for number in range(3) for document in documents(number, 40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def write_texts(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        path = folder / f"part {number % 3}/{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def write_zst(folder: Path) -> None:
    compressed = pyarrow.compress(LINES, codec="zstd", asbytes=True)
    (folder / "a.jsonl.zst").write_bytes(compressed)


FORMATS: dict[str, Callable[[Path], object]] = {
    "txt": write_texts,
    "jsonl": lambda folder: (folder / "a.jsonl").write_bytes(LINES),
    "zst": write_zst,
    "gz": lambda folder: (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES)),
    "csv": lambda folder: polars.DataFrame({"body": TEXTS}).write_csv(folder / "a.csv"),
    "parquet": lambda folder: polars.DataFrame({"essay": TEXTS}).write_parquet(
        folder / "a.parquet"
    ),
}


def run_printed(project: Project, said: str, beginning: str) -> Outcome:
    """Run the command of which the last one's output has the beginning."""
    line = next(m for m in re.findall(r"uv run (.*)", said) if m.startswith(beginning))
    program, *words = line.split()
    if program == "olmo":
        return project.olmo(*words)
    assert words[:1] == ["--cores"]
    return project.run(*words[2:], cores=int(words[1]))


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.long] * (k != "txt")) for k in FORMATS]
)
def test_a_folder_becomes_a_checkpoint_and_a_chat(project: Project, kind: str):
    folder = project.root / "in"
    folder.mkdir()
    FORMATS[kind](folder)
    said = project.olmo("new", "mine", "in", "--hours", "0.01").output
    assert f"{len(TEXTS)} documents" in said, said
    made = run_printed(project, said, "snakemake")
    first, last = map(float, re.findall(r"held-out loss ([\d.]+) → ([\d.]+)", made.output)[0])
    assert last < 0.95 * first
    table = polars.concat(
        polars.read_parquet(path)
        for path in (project.root / "data/mine/documents").glob("*.parquet")
    )
    assert len(table) == len(TEXTS) and set(table["split"]) == {"train", "heldout"}
    config = project.read("config/train/mine.yaml")
    record = json.loads((project.root / "checkpoints/mine/final/record.json").read_text())
    assert record["facts"]["steps"] == config["max_duration"]
    answered = run_printed(project, made.output, "olmo chat")
    assert answered.status == 0, answered.output


def test_too_few_instances_end_before_training(project: Project):
    project.change("config/train/small.yaml", global_train_batch_size=4096)
    outcome = project.run(ok=False)
    assert "expected at least 4096 instances of 64 tokens, a batch; found" in outcome.output
    assert outcome.status and not outcome.ran["training"]
