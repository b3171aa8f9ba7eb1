"""Two scorers agree on one file; results become tables; what cannot be asked is said clearly."""

import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_bench import shard
from test_huggingface import OLMO2, checkpoint

from olmo.config import TrainConfig
from olmo.corpus.docstrings import DATASET, stdlib_docstrings
from olmo.corpus.listing import Entry, write_listing
from olmo.eval.final import measure_perplexity, score_task
from olmo.eval.harness import run_harness, write_task
from olmo.eval.tasks import ChoiceTask, build_requests, find_task
from olmo.model import OLMo
from olmo.pipeline.convert import convert
from olmo.pipeline.evaluate import heldout
from olmo.pipeline.plan import Plan
from olmo.report.scores import heldout_scores

LABEL = "stdlib_docstrings"
ROWS = "hf_datasets/stdlib_docstrings/none/test/documents.jsonl"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions") / "made"
    stdlib_docstrings.build(folder=folder, questions=40)
    return folder


@pytest.fixture
def final(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "final", OLMO2)
    return tmp_path / "final"


def exported(final: Path, tokenizer: Path) -> Path:
    return convert(final, final.parent / "hf", kind="hf", tokenizer=tokenizer)


@pytest.mark.slow  # lm-eval's import alone is seconds
def test_both_scorers_agree(
    final: Path,
    questions: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    """The same documents by lm-eval on the export and by ours on the checkpoint."""
    ours, our_questions, our_requests = score_task(final, find_task(LABEL), tokenizer, questions, 4)
    (tmp_path / "tasks").mkdir()
    write_task(find_task(LABEL), questions, tmp_path / "tasks")
    hf = exported(final, tokenizer)
    theirs, their_questions, their_requests = run_harness(
        hf, [LABEL], [tmp_path / "tasks"], batch_size=3
    )

    assert len(our_requests) == len(their_requests) == 160
    for mine, other in zip(our_requests, their_requests, strict=True):
        for key in ("document", "option", "context", "continuation"):
            assert mine[key] == other[key]
        assert mine["loglikelihood"] == pytest.approx(other["loglikelihood"], abs=1e-4)
    mine = {row["metric"]: row for row in ours}
    other = {row["metric"]: row for row in theirs}
    for our_name, their_name in (("acc", "acc"), ("len_norm", "acc_norm")):
        for key in ("value", "stderr", "documents"):
            assert mine[our_name][key] == pytest.approx(other[their_name][key], abs=1e-9)
    assert 0 < mine["acc"]["value"] < 1 and mine["acc"]["stderr"] > 0

    # Each question's score: the same question by both, and its mean is the table's, to the bit.
    asked = [{q["question"] for q in of} for of in (our_questions, their_questions)]
    assert asked[0] == asked[1] and len(asked[0]) == 40
    for rows, of in ((ours, our_questions), (theirs, their_questions)):
        for row in rows:
            values = [q["value"] for q in of if q["metric"] == row["metric"]]
            assert len(values) == 40 and sum(values) / 40 == row["value"]
    right = [r for r in our_requests if r["option"] == r["target"]]
    bits = [-r["loglikelihood"] / math.log(2) / len(r["continuation"][1:].encode()) for r in right]
    assert mine["bpb"]["value"] == pytest.approx(sum(bits) / 40)

    some, *_ = run_harness(hf, [LABEL], [tmp_path / "tasks"], limit=7)
    fewer, *_ = score_task(final, find_task(LABEL), tokenizer, questions, 4, limit=7)
    assert some[0]["documents"] == fewer[0]["documents"] == 7
    assert some[0]["value"] == fewer[0]["value"]


@pytest.mark.slow
def test_the_questions_can_be_answered(questions: Path) -> None:
    rows = [json.loads(line) for line in (questions / ROWS).read_text().splitlines()]
    assert len(rows) == 40
    assert all(len(set(row["options"])) == 4 for row in rows)
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    library = Path(sysconfig.get_path("stdlib"))
    for row in rows:
        assert row["options"][row["answer"]] in (library / row["path"]).read_text()


def changed(questions: Path, into: Path, **values: Any) -> Path:
    """The questions with fields of the third document changed."""
    rows = [json.loads(line) for line in (questions / ROWS).read_text().splitlines()]
    rows[2] |= values
    (into / ROWS).parent.mkdir(parents=True)
    (into / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return into


@pytest.mark.parametrize("answer", [None, -1, 4])
def test_a_task_without_answers(
    answer: int | None,
    final: Path,
    questions: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    folder = changed(questions, tmp_path / "changed", answer=answer)
    said = rf"'{LABEL}': document 2 of {DATASET} has no answer.*found {answer}"
    with pytest.raises(ValueError, match=said):
        score_task(final, find_task(LABEL), tokenizer, folder, 4)
    with pytest.raises(ValueError, match=said):
        write_task(find_task(LABEL), folder, tmp_path)


@pytest.mark.slow
def test_what_the_harness_cannot_be_asked(
    final: Path,
    questions: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    fields: dict[str, Any] = {
        "dataset": DATASET,
        "split": "test",
        "options": "options",
        "target": "answer",
    }
    by_option = ChoiceTask(LABEL, "acc", **fields, context="{{ option }}")
    with pytest.raises(ValueError, match="a context for each option"):
        write_task(by_option, questions, tmp_path)
    right_alone = ChoiceTask(LABEL, "bpb", **fields)
    with pytest.raises(ValueError, match="no options to choose from"):
        write_task(right_alone, questions, tmp_path)
    hf = exported(final, tokenizer)
    with pytest.raises(ValueError, match="there is no task 'none_such'"):
        run_harness(hf, ["none_such"], [])
    # No network here (HF_HUB_OFFLINE): what the harness says of the hub, and what to do.
    with pytest.raises(ValueError, match=r"harness: sciq: .*hub.*task_files"):
        run_harness(hf, ["sciq"], [], limit=1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: x\n"
    )
    with pytest.raises(ValueError, match=r"harness: broken: .*nowhere"):
        run_harness(hf, ["broken"], [tmp_path / "own"])


def test_the_error_of_a_held_out_loss(final: Path) -> None:
    """Loss and standard error beside those of each instance by itself."""
    tokens = np.random.default_rng(0).integers(2, 300, 5 * 128).astype(np.uint16)
    tokens.tofile(final / "heldout.npy")
    model = OLMo.from_checkpoint(final)
    cfg = TrainConfig.load(final / "config.yaml", validate_paths=False)
    ids = torch.from_numpy(tokens.astype(np.int64)).view(5, cfg.model.max_sequence_length)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item()
            for row in ids
        ]
    found = measure_perplexity(final, [final / "heldout.npy"])
    assert found["instances"] == 5
    assert found["CrossEntropyLoss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["stderr"] == pytest.approx(np.std(losses, ddof=1) / math.sqrt(5), rel=1e-4)
    tokens[:128].tofile(final / "one.npy")
    assert measure_perplexity(final, [final / "one.npy"])["stderr"] is None


def test_nothing_was_held_out(final: Path, tmp_path: Path) -> None:
    write_listing(
        tmp_path / "000.tsv", [Entry("a", "heldout-tokens", "heldout/a.npy", "0" * 64, 0)]
    )
    with pytest.raises(ValueError, match=r"expected held-out documents, found none in 1 listings"):
        heldout(final, [tmp_path / "000.tsv"], tmp_path / "a.json", tmp_path / "a.parquet")


def test_another_tokenizers_held_out_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their ids mean other words to this run, and yet they would give a number."""
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    ours, theirs = (shard("text", "held out", tokenizer) for tokenizer in ("bpe", "unigram"))
    TrainConfig.new(data={"paths": [f"objects/{ours}"]}).save(tmp_path / "config.yaml")
    for tokens, message in (
        (theirs, "one tokenizer for the run and for the held-out documents, found two"),
        (ours, "expected held-out documents, found none"),  # in this listing, of 0 bytes
    ):
        write_listing(tmp_path / "000.tsv", [Entry("a", "heldout-tokens", "a.npy", tokens, 0)])
        with pytest.raises(ValueError, match=message):
            heldout(tmp_path, [tmp_path / "000.tsv"], tmp_path / "a.json", tmp_path / "a.parquet")


def test_answers_have_a_row_of_their_own_the_first() -> None:
    found = {"CrossEntropyLoss": 2.0, "Perplexity": math.e**2, "stderr": 0.1, "instances": 9}
    rows = heldout_scores(found | {"CrossEntropyLossPerLabel": 3.5}, "heldout of answers")
    assert [(r["metric"], r["value"]) for r in rows[:2]] == [
        ("loss per answer token", 3.5),
        ("loss", 2.0),
    ]
    assert rows[2]["stderr"] == pytest.approx(0.1 * math.e**2)
    assert len(heldout_scores(found, "heldout")) == 2


def test_a_plan_knows_its_runs_and_tasks(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text("choices: [piqa]\nharness: [sciq]\nlimit: 5\n")
    runs = {"one": {"train": "t.yaml", "evaluation": str(file)}, "two": {"train": "t.yaml"}}
    plan = Plan({"runs": runs})
    assert plan.evaluation_flags("one") == (
        """--config '{"choices": ["piqa"], "harness": ["sciq"], "limit": 5}'"""
    )
    assert plan.evaluation_flags("two") == "--config '{}'"
    with pytest.raises(ValueError, match=r"expected one of the runs one, two; found three"):
        plan.dataset("three")
    file.write_text("choices: [piqqa]\n")
    with pytest.raises(ValueError, match="no downstream task 'piqqa'; did you mean piqa"):
        plan.evaluation_flags("one")
    file.write_text("harnes: [sciq]\n")
    with pytest.raises(ValueError, match="harnes"):
        plan.evaluation_flags("one")


def test_the_task_is_one_of_ours(questions: Path) -> None:
    first = build_requests(find_task(LABEL), questions)[0]
    assert first.context.startswith("def ") and first.context.endswith('):\n    """')
