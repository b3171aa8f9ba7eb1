"""After the checkpoint, through the real Snakefile: export, evaluation, runs side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars
import pytest
from project import Project

OFFLINE = """
import sys
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained("hf/small")
(text,) = pipeline("text-generation", model="hf/small")("def ", max_new_tokens=8, do_sample=False)
assert text["generated_text"].startswith("def "), text
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("after") / "project")
    project.use_given_tokenizer(tokenizer)
    project.write(
        "config/eval/small.yaml",
        {
            "choices": ["stdlib_docstrings"],
            "harness": ["stdlib_docstrings"],
            "limit": 12,
            "suites": {"ONE": [{"task": "stdlib_*", "metric": "acc", "chance": 0.25}]},
        },
    )
    # A data set of the same tokenizer, and one of another.
    given = {"file": "tokenizer.json", "eos_token_id": 0, "pad_token_id": 1}
    more = {"sources": {"files": ["sources/part-2.json.gz"]}, "documents": {"heldout_share": 0.3}}
    project.write("config/data/more.yaml", {**more, "tokenizer": given})
    trained = {"train_vocab_size": 300, "eos_token_id": 0, "pad_token_id": 1}
    project.write("config/data/strange.yaml", {**more, "tokenizer": trained})
    run = {"train": "config/train/small.yaml", "dataset": "small"}
    asked = {**run, "evaluation": "config/eval/small.yaml"}
    other = {**asked, "overrides": ["optimizer.learning_rate=1e-3"]}
    runs = {"small": asked, "other": other}
    project.change("config/config.yaml", runs=runs, eval=["small", "other"])
    return project


def test_evaluated_by_both_scorers(project: Project) -> None:
    first = project.run("eval/small", timeout=600)
    assert {"huggingface_export", "heldout_perplexity", "choice_task"} < set(first.ran)
    rows = json.loads((project.root / "eval/small/results.json").read_text())
    found = {(row["scorer"], row["task"], row["metric"]): row for row in rows}
    last = project.metrics()[-1]["eval/heldout/CrossEntropyLoss"]
    loss = found["ours", "heldout", "loss"]
    assert loss["value"] == pytest.approx(last, abs=1e-6) and 0 < loss["stderr"] < 1
    ours, theirs = (found[by, "stdlib_docstrings", "acc"] for by in ("ours", "lm-eval"))
    assert (ours["value"], ours["documents"]) == (theirs["value"], 12)
    suite = found["suite", "ONE", "centered score"]
    assert suite["value"] == pytest.approx((theirs["value"] - 0.25) / 0.75)
    scored = polars.read_parquet(project.root / "eval/small/questions.parquet")
    asked = scored.filter(metric="acc").partition_by("scorer", as_dict=True)
    assert asked["ours",].drop("scorer").equals(asked["lm-eval",].drop("scorer"))
    assert polars.read_parquet(project.root / "eval/small/results.parquet").height == len(rows)
    asked = polars.read_parquet(project.root / "eval/small/requests.parquet")
    a, b = (asked.filter(scorer=by)["loglikelihood"] for by in ("ours", "lm-eval"))
    assert len(a) == len(b) == 48 and (a - b).abs().max() < 1e-4
    assert "| heldout | ours | loss |" in (project.root / "eval/small/table.md").read_text()
    again = project.run("eval/small")
    assert not again.ran and not again.found


def test_the_export_works_offline(project: Project) -> None:
    script = [sys.executable, "-c", OFFLINE]
    subprocess.run(script, check=True, cwd=project.root, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    card = (project.root / "hf/small/README.md").read_text()
    assert "OlmoForCausalLM" in card and project.content() in card
    assert "| a local file |" in card and "training (version 3)" in card
    back = project.olmo("checkpoint", "convert", "hf/small", "back", "--kind", "safetensors")
    assert back.status == 0, back.output
    for name in ("model.safetensors", "config.yaml"):
        before, after = project.final / name, project.root / "back" / name
        assert before.read_bytes() == after.read_bytes()


def test_another_task_asks_that_one_only(project: Project) -> None:
    project.change("config/eval/small.yaml", harness=[], suites={}, heldout=["more"])
    changed = project.run("eval/small")
    assert changed.ran["evaluation"] == changed.ran["heldout_perplexity"] == 1
    assert changed.found["choice_task"] == 1 and "harness_tasks" not in changed.ran
    table = (project.root / "eval/small/table.md").read_text()
    assert "| heldout of more | ours | loss |" in table and "lm-eval" not in table
    project.change("config/eval/small.yaml", heldout=["strange"])
    strange = project.run("eval/small", ok=False)
    assert "expected one tokenizer for the run and for the held-out documents" in strange.output
    project.change("config/eval/small.yaml", heldout=["nowhere"])
    nowhere = project.run("eval/small", ok=False)
    assert "expected the recipe config/data/nowhere.yaml, found none" in nowhere.output
    project.change("config/eval/small.yaml", heldout=[])


def test_runs_side_by_side(project: Project) -> None:
    project.run("eval", timeout=600)
    table = (project.root / "bench-results/eval/table.md").read_text()
    assert "| task | scorer | metric | small | other | detectable |" in table
    assert table.startswith("In brackets: the difference to small") and table.count(" ± ") >= 6
    compared = polars.read_parquet(project.root / "bench-results/eval/results.parquet")
    known = compared.filter(polars.col("difference").is_not_null())
    assert set(known["metric"]) == {"acc", "len_norm", "bpb", "bits_per_byte"}
    each = polars.read_parquet(project.root / "eval/small/documents.parquet")
    for metric, count in (("acc", 12), ("bits_per_byte", len(each))):
        assert set(known.filter(metric=metric)["questions"]) == {count}


def test_bad_input(project: Project) -> None:
    nobody = project.run("eval/nobody", ok=False)
    assert (
        "config/config.yaml: expected one of the runs small, other; found nobody" in nobody.output
    )
    nobody = project.run("hf/nobody", ok=False)
    assert (
        "config/config.yaml: expected one of the runs small, other; found nobody" in nobody.output
    )
    project.change("config/eval/small.yaml", choices=["stdlib_docstring"])
    wrong = project.run("eval/small", ok=False)
    assert (
        "there is no downstream task 'stdlib_docstring'; did you mean stdlib_docstrings"
        in wrong.output
    )
    project.change("config/eval/small.yaml", choices=["sciq"])
    offline = project.run("eval/small", ok=False)
    assert "'sciq' needs the validation split of sciq" in offline.output
    assert "Give a folder that has" in offline.output
