"""Fine-tuning from another run of the pipeline, or from a checkpoint, on conversations."""

import json
import math
import re
import shutil
from pathlib import Path

import polars
import pytest
from project import Project
from servers import web_server

FINAL = "checkpoints/tuned/final"
QUESTIONS = 60


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Project:
    """A project whose run `tuned` starts from `small`; tests in order change it."""
    project = Project(tmp_path_factory.mktemp("tuning") / "project")
    project.use_given_tokenizer(tokenizer)
    project.change("config/train/small.yaml", max_duration=12, eval_interval=12)
    write_talks(project)
    project.write(
        "config/data/talks.yaml",
        {
            "sources": {"files": ["talks/*.jsonl"]},
            "documents": {"heldout_share": 0.2},
            "instructions": {"sequence_length": 64},
            "tokenizer": {"dataset": "small"},
        },
    )
    shutil.copy(project.root / "config/train/small.yaml", project.root / "config/train/tuned.yaml")
    project.change(
        "config/train/tuned.yaml",
        reset_trainer_state=True,
        reset_optimizer_state=True,
        data={"drop_last": True},
    )
    start_from(project, "small")
    first = project.run(FINAL, timeout=900)
    assert first.ran["training"] == 2 and first.ran["instances"] == 2, first.output
    return project


def start_from(project: Project, base: str) -> None:
    tuned = {"train": "config/train/tuned.yaml", "dataset": "talks", "start_from": base}
    project.change("config/config.yaml", runs__tuned=tuned)


def write_talks(project: Project, answer: str = "twice {} is {}", role: str = "assistant") -> None:
    lines = []
    for i in range(QUESTIONS):
        said = [("user", f"What is 2 x {i}?"), (role, answer.format(i, 2 * i))]
        lines.append({"messages": [{"role": r, "content": text} for r, text in said]})
    (project.root / "talks").mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (project.root / "talks/twice.jsonl").write_text(text)


def record(project: Project) -> dict:
    return json.loads((project.root / FINAL / "record.json").read_text())


def test_the_held_out_answers_loss_falls(tuned: Project):
    loss = record(tuned)["facts"]["heldout_loss"]["heldout"]
    assert loss["last"] < loss["first"] - 0.5
    rows = [json.loads(line) for line in (tuned.root / FINAL / "metrics.jsonl").open()]
    assert rows[0]["step"] == 0, "measured before the first step, on the base's weights"
    assert loss["first"] == rows[0]["eval/heldout/CrossEntropyLossPerLabel"]
    tuned.run("checkpoints/tuned/heldout.json", "data/talks/statistics.txt")
    found = json.loads((tuned.root / "checkpoints/tuned/heldout.json").read_text())
    assert found["CrossEntropyLossPerLabel"] == pytest.approx(loss["last"], abs=1e-6)
    # An instance is a conversation alone, so the loop reads what the measure of documents reads.
    bits = record(tuned)["facts"]["heldout_bits_per_byte"]["heldout"]
    each = polars.read_parquet(tuned.root / "checkpoints/tuned/heldout.parquet")
    measured = each["nats"].sum() / math.log(2) / each["bytes"].sum()
    assert measured == pytest.approx(bits["last"], rel=1e-5) and bits["last"] < bits["first"]
    text = (tuned.root / "data/talks/statistics.txt").read_text()
    counts = [int(n) for n in re.findall(r"^in all +(?:train|heldout) +(\d+)", text, re.M)]
    assert len(counts) == 2 and sum(counts) == QUESTIONS


def test_again_runs_nothing(tuned: Project):
    assert "Nothing to be done" in tuned.run(FINAL).output


def test_the_same_weights_by_another_way_are_the_same_run(tuned: Project):
    before = record(tuned)["content"]
    official = next((tuned.root / "checkpoints/small/run").glob("step12-unsharded")).resolve()
    start_from(tuned, str(official))
    found = tuned.run(FINAL)
    assert found.ran == {"local_checkpoint": 1}, found.output
    assert record(tuned)["content"] == before
    config = (tuned.root / FINAL / "config.yaml").read_text()
    assert re.search(r"^load_path: .*/objects/", config, re.M) and str(tuned.root) not in config
    with web_server(tuned.root / "checkpoints") as url:
        start_from(tuned, f"{url}/small/final")
        found = tuned.run(FINAL)
        assert found.ran == {"fetched_checkpoint": 1}, found.output
        start_from(tuned, f"{url}/nobody/final")
        refused = tuned.run(FINAL, ok=False)
    assert refused.status and f"{url}/nobody/final" in refused.output, refused.output
    assert record(tuned)["content"] == before


def test_what_is_tuned_can_be_looked_into_and_replayed(tuned: Project):
    shown = tuned.olmo("inspect", "--run", "tuned", "--step", "2").output
    assert "<|user|>" in shown and "(twice.json.gz:" in shown
    told = tuned.olmo("seen", "--run", "tuned", "--text", "twice 7 is 14")
    steps = [int(step) for step in re.findall(r"^  step (\d+), ", told.output, re.M)]
    held_out = "no document of tuned's data has the text" in told.output
    assert held_out or steps, told.output
    if steps:
        shown = tuned.olmo("inspect", "--run", "tuned", "--step", str(steps[0])).output
        assert "twice 7 is 14" in shown
    equal = tuned.olmo("replay", "tuned", "--steps", "1..4")  # from the base's weights
    assert equal.status == 0 and "4 steps, equal to the bit" in equal.output, equal.output


def test_a_retrained_base_is_tuned_again(tuned: Project):
    start_from(tuned, "small")
    before = record(tuned)["content"]
    assert not tuned.run(FINAL).ran, "the same weights again"
    tuned.change("config/train/small.yaml", seed=11)
    again = tuned.run(FINAL)
    assert again.ran["training"] == 2, again.output
    assert record(tuned)["content"] != before


def test_a_second_stage_and_a_soup(tuned: Project):
    settings = ["max_duration=6", "reset_trainer_state=true", "scheduler.alpha_f=0.0"]
    stage = {"train": "config/train/small.yaml", "dataset": "small", "start_from": "small"}
    tuned.change("config/config.yaml", runs__stage2={**stage, "overrides": settings})
    tuned.change("config/config.yaml", soups={"soup": ["stage2", "small"]})
    made = tuned.run("checkpoints/soup/heldout.json")
    assert made.ran["training"] == 1 and made.ran["averaged"] == 1, made.output
    final = tuned.root / "checkpoints/stage2/final"
    rows = [json.loads(line) for line in (final / "metrics.jsonl").open()]
    assert rows[-1]["optim/learning_rate_group0"] == 0.0
    losses = json.loads((final / "record.json").read_text())["facts"]["heldout_loss"]["heldout"]
    found = json.loads((tuned.root / "checkpoints/soup/heldout.json").read_text())
    assert abs(found["CrossEntropyLoss"] - losses["first"]) < 0.5
    equal = tuned.olmo("replay", "stage2", "--steps", "1..3")  # with the base's optimizer state
    assert equal.status == 0 and "3 steps, equal to the bit" in equal.output, equal.output
    said = tuned.olmo("generate", "soup", "--prompt", "def", "--tokens", "4")
    assert said.status == 0 and said.output.strip("\n"), said.output


def test_a_malformed_conversation_is_named(tuned: Project):
    write_talks(tuned, role="wizard")
    refused = tuned.run(FINAL, ok=False)
    assert refused.status and "twice.json.gz:1: unknown-role" in refused.output, refused.output
