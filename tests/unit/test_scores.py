"""`olmo scores`: runs side by side, with the differences of the questions that both answered."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest

from olmo.eval.harness import check_answers, extract_metrics, extract_questions
from olmo.eval.paired import (
    combine,
    estimate_difference,
    estimate_ratio,
    paired_difference,
    with_interval,
)
from olmo.eval.questions import score_suite
from olmo.pipeline.evaluate import evaluation
from olmo.report.differences import QUESTIONS
from olmo.report.scores import format_run_table, scores

TASK = ("quiz", "ours", "acc")


def row(task: str, metric: str, value: float, stderr: float | None = None) -> dict[str, Any]:
    common = {"scorer": "ours", "task": task, "documents": 10}
    return {**common, "metric": metric, "value": value, "stderr": stderr}


def answered(
    run: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    documents: polars.DataFrame | None = None,
    **tasks: dict[str, float],
) -> Path:
    """eval/<run>, with the scores of questions by task, `quiz_acc={"question": 1.0}`."""
    run.mkdir(parents=True)
    questions, found = [], list(rows or [])
    for name, values in tasks.items():
        task, _, metric = name.rpartition("_")
        common = {"scorer": "ours", "task": task, "metric": metric}
        questions += [{**common, "question": q, "value": value} for q, value in values.items()]
        found.append(row(task, metric, sum(values.values()) / len(values), 0.05))
    (run / "results.json").write_text(json.dumps(found))
    polars.DataFrame(questions, schema=QUESTIONS).write_parquet(run / "questions.parquet")
    if documents is not None:
        documents.write_parquet(run / "documents.parquet")
    return run


def compare(*runs: Path) -> tuple[str, dict[tuple[str, str], dict[str, Any]]]:
    """The table, and the rows of the parquet file by run and task."""
    out = runs[0].parent / "out"
    scores(list(runs), out / "table.md", out / "all.parquet")
    rows = polars.read_parquet(out / "all.parquet").iter_rows(named=True)
    return (out / "table.md").read_text(), {(row["run"], row["task"]): row for row in rows}


def random_answers(seed: int, n: int = 60, share: float = 0.5) -> dict[str, float]:
    drawn = np.random.default_rng(seed).random(n) < share
    return {f"q{i}": float(value) for i, value in enumerate(drawn)}


def test_runs_side_by_side(tmp_path: Path) -> None:
    """The second asked other questions, too, and in another order; each finds its own."""
    one, two = random_answers(1, share=0.3), random_answers(2, share=0.9)
    more = {"only here": 0.0, **dict(reversed(two.items()))}
    loss = [row("heldout", "loss", 5.0, 0.3)]
    bits = {q: 2.0 + value for q, value in one.items()}
    fewer = {q: value - 0.25 for q, value in list(bits.items())[:9]}
    a = answered(tmp_path / "a", rows=loss, quiz_acc=one, text_bpb=bits)
    b = answered(
        tmp_path / "b", rows=[*loss, row("mrpc", "f1", 0.2)], quiz_acc=more, text_bpb=fewer
    )
    table, rows = compare(a, b)

    expected = paired_difference(list(one.values()), list(two.values()))
    found = rows["b", "quiz"]
    assert [found[k] for k in ("difference", "low", "high", "p", "detectable", "questions")] == (
        pytest.approx([expected[i] for i in (0, 2, 3, 4, 5, 6)])
    )
    assert found["p_holm"] == pytest.approx(2 * expected.p) or found["p_holm"] == expected.p
    assert rows["b", "text"]["difference"] == -0.25 and rows["b", "text"]["questions"] == 9
    assert rows["a", "quiz"]["difference"] is None and rows["b", "heldout"]["p"] is None
    said, _, *lines = table.splitlines()
    assert "of 2, 2 are without 0, where runs that do not differ would give 0.1; 2 are left" in said
    interval = f"{expected.value:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}] better"
    mean = sum(more.values()) / len(more)
    assert lines[0] == "| task | scorer | metric | a | b | detectable |"
    assert lines[2] == "| heldout | ours | loss | 5.0000 ± 0.3000 | 5.0000 ± 0.3000 |  |"
    assert lines[3].endswith(f"| {mean:.4f} ± 0.0500 ({interval}) | {expected.detectable:.4f} |")
    assert "(-0.2500 [-0.2500, -0.2500] better)" in lines[4], "fewer bits are better"
    assert lines[5] == "| mrpc | ours | f1 |  | 0.2000 |  |"


def test_a_question_that_is_asked_twice(tmp_path: Path) -> None:
    runs = [answered(tmp_path / name, quiz_acc={"q": 1.0}) for name in "ab"]
    for run, values in zip(runs, ((0.0, 1.0, 1.0), (0.5, 1.0)), strict=True):
        asked = [{**dict(zip(("task", "scorer", "metric"), TASK, strict=True))} for _ in values]
        frame = [{**q, "question": "q", "value": v} for q, v in zip(asked, values, strict=True)]
        polars.DataFrame(frame, schema=QUESTIONS).write_parquet(run / "questions.parquet")
    found = compare(*runs)[1]["b", "quiz"]
    assert (found["questions"], found["difference"]) == (2, 0.25)


def test_a_suite_and_what_it_is_made_of(tmp_path: Path) -> None:
    members = [
        {"scorer": "ours", "task": "quiz", "metric": "acc", "chance": 0.25},
        {"scorer": "ours", "task": "other", "metric": "acc", "chance": 0.0},
    ]
    runs, tasks = [], []
    for name, seed in (("a", 1), ("b", 2)):
        tasks.append([random_answers(seed), random_answers(seed + 5, 30, share=0.2 * seed)])
        run = answered(tmp_path / name, quiz_acc=tasks[-1][0], other_acc=tasks[-1][1])
        rows = json.loads((run / "results.json").read_text())
        rows.append(score_suite("SUITE", members, rows))
        (run / "results.json").write_text(json.dumps(rows))
        runs.append(run)
    table, found = compare(*runs)
    parts = [
        estimate_difference(list(a.values()), list(b.values())) for a, b in zip(*tasks, strict=True)
    ]
    expected = with_interval(combine(parts, [0.5 / 0.75, 0.5]))
    suite = found["b", "SUITE"]
    assert suite["value"] - found["a", "SUITE"]["value"] == pytest.approx(expected.value)
    assert [suite[k] for k in ("difference", "low", "high", "p", "questions")] == pytest.approx(
        [expected[i] for i in (0, 2, 3, 4, 6)]
    )
    assert suite["questions"] == 90
    (line,) = (line for line in table.splitlines() if line.startswith("| SUITE | quiz |"))
    shown = [f"{found[name, 'quiz']['value']:.4f}" for name in "ab"]
    assert line == f"| SUITE | quiz | ours | acc | 0.25 | 0.5000 | {shown[0]} | {shown[1]} |"
    alone = format_run_table(json.loads((runs[0] / "results.json").read_text()))
    assert f"| SUITE | quiz | ours | acc | 0.25 | 0.5000 | {shown[0]} |" in alone

    rows = json.loads((runs[1] / "results.json").read_text())
    rows[-1]["parts"][0]["chance"] = 0.5
    (runs[1] / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="SUITE: expected a suite of the same parts, found others"):
        compare(*runs)


def test_bits_per_byte_of_held_out_documents(tmp_path: Path) -> None:
    """As of runs with other tokenizers: the documents are the same, their tokens are not."""
    rng = np.random.default_rng(0)
    runs, nats = [], []
    sizes = rng.integers(50, 5000, 40)
    for name, rate in (("a", 1.1), ("b", 0.9)):
        nats.append(sizes * rate * rng.uniform(0.9, 1.1, 40))
        frame = polars.DataFrame({"digest": [f"d{i}" for i in range(40)], "bytes": sizes})
        own = frame.with_columns(nats=nats[-1], dataset=polars.lit("heldout"), tokens=7)
        other = frame.with_columns(
            nats=sizes * rate, dataset=polars.lit("heldout of more"), tokens=7
        )
        rows = [row(task, "bits_per_byte", rate) for task in ("heldout", "heldout of more")]
        documents = polars.concat([own, other]).sample(fraction=1, shuffle=True, seed=len(runs))
        runs.append(answered(tmp_path / name, rows=rows, documents=documents))
    table, found = compare(*runs)
    expected = with_interval(estimate_ratio((nats[1] - nats[0]) / math.log(2), sizes))
    own = found["b", "heldout"]
    assert [own[k] for k in ("difference", "low", "high", "questions")] == pytest.approx(
        [expected[i] for i in (0, 2, 3, 6)]
    )
    assert found["b", "heldout of more"]["difference"] == pytest.approx(-0.2 / math.log(2))
    assert table.count("better") == 3  # the explanation, and both


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("nats", [1.0, None], "nats is not set in all rows"),
        ("bytes", [10, -10], "bytes are below 0"),
        ("nats", ["a", "b"], "conversion from"),
        (None, [], "documents.parquet, the scores one by one, found none; evaluate again: rm -r"),
    ],
)
def test_damaged_losses_of_documents(
    column: str | None, values: list[Any], message: str, tmp_path: Path
) -> None:
    frame = polars.DataFrame({"dataset": "heldout", "digest": ["d", "e"], "bytes": [10, 20]})
    frame = frame.with_columns(nats=polars.Series([5.0, 6.0]))
    rows = [row("heldout", "bits_per_byte", 0.5)]
    a, b = (answered(tmp_path / name, rows=rows, documents=frame) for name in "ab")
    assert compare(a, b)[1]["b", "heldout"]["difference"] == 0
    if column is None:
        (b / "documents.parquet").unlink()
    else:
        frame.with_columns(polars.Series(column, values)).write_parquet(b / "documents.parquet")
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_an_older_evaluation_without_bits_per_byte(tmp_path: Path) -> None:
    a = answered(tmp_path / "a", quiz_acc={"q": 1.0}, rows=[row("heldout", "loss", 2.0)])
    frame = {"dataset": ["heldout"], "digest": ["d"], "bytes": [10], "nats": [5.0]}
    rows = [row("heldout", "loss", 2.0), row("heldout", "bits_per_byte", 0.5)]
    b = answered(tmp_path / "b", quiz_acc={"q": 0.0}, rows=rows, documents=polars.DataFrame(frame))
    table = compare(a, b)[0]
    assert "| heldout | ours | bits_per_byte |  | 0.5000 |  |" in table and "(-1.0000" in table


def test_runs_with_other_held_out_documents(tmp_path: Path) -> None:
    """Of other data sets: their tasks are compared, and of their documents those in both."""
    rows = [row("heldout", "bits_per_byte", 0.5)]
    frame = polars.DataFrame({"dataset": "heldout", "bytes": [10, 20], "nats": [5.0, 6.0]})
    runs = [
        answered(
            tmp_path / name,
            rows=rows,
            quiz_acc={"q": float(name == "a"), "r": 1.0},
            documents=frame.with_columns(digest=polars.Series(texts)),
        )
        for name, texts in (("a", ["d", "e"]), ("b", ["f", "g"]), ("c", ["e", "d"]))
    ]
    found = compare(*runs)[1]
    assert found["b", "heldout"]["difference"] is None and found["b", "quiz"]["difference"] == -0.5
    assert found["c", "heldout"]["difference"] is None, "other bytes"


def test_a_diverged_run_has_no_difference(tmp_path: Path) -> None:
    a = answered(tmp_path / "a", quiz_acc={"q": 1.0, "r": 0.0})
    b = answered(tmp_path / "b", rows=[row("quiz", "acc", 0.0)])
    values = [{"task": "quiz", "scorer": "ours", "metric": "acc", "value": math.nan}] * 2
    frame = [{**v, "question": q} for v, q in zip(values, "qr", strict=True)]
    polars.DataFrame(frame, schema=QUESTIONS).write_parquet(b / "questions.parquet")
    assert compare(a, b)[1]["b", "quiz"]["difference"] is None


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = answered(tmp_path / "a", quiz_acc={"q": 1.0})

    def refused(message: str, *others: Path) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            compare(a, *others)
        assert "\n" not in str(raised.value)

    refused("expected two runs or more, the reference first, found a; name them: `eval`")
    with pytest.raises(ValueError, match=r"expected two runs or more, .*found none"):
        scores([], tmp_path / "t.md", tmp_path / "t.parquet")
    refused(r"expected .*none/results.json, found none; make it: .*eval/none", tmp_path / "none")
    again = tmp_path / "more" / "a"
    refused("different names, found a, a", answered(again, quiz_acc={"q": 1.0}))
    other = answered(tmp_path / "other", quiz_acc={"r": 1.0, "s": 0.0})
    refused(
        r"quiz \(ours, acc\): expected questions that both a and other answered, found 1 and 2 "
        "others; evaluate both on the same data",
        other,
    )
    none = answered(tmp_path / "no_answers", rows=[row("quiz", "acc", 0.5, 0.1)])
    refused(r"quiz \(ours, acc\): expected each question's score, found none of no_answers", none)
    stranger = answered(tmp_path / "stranger", sums_acc={"q": 1.0})
    refused("expected a task that both a and stranger answered, found quiz and sums", stranger)
    old = answered(tmp_path / "old", quiz_acc={"q": 1.0})
    (old / "questions.parquet").unlink()
    refused(r"expected .*old/questions.parquet, the scores one by one, found none; .*rm -r", old)
    suite = answered(tmp_path / "suite", rows=[row("S", "acc", 0.5) | {"parts": [{"task": "q"}]}])
    refused(r"suite/results.json is damaged: expected rows with scorer, task", suite)
    part = {"scorer": "ours", "task": "quiz", "metric": "acc", "weight": 1.0, "value": 0.5}
    wrong: list[Any] = [
        {},
        [row("quiz", "acc", 0.5) | {"value": "much"}],
        [row("quiz", "acc", 0.5) | {"task": 1}],
        [row("S", "acc", 0.5) | {"parts": [part | {"chance": 1}]}],
        [row("S", "acc", 0.5) | {"parts": [part | {"chance": 0.1, "weight": "much"}]}],
    ]
    for content in wrong:
        (suite / "results.json").write_text(json.dumps(content))
        refused(r"suite/results.json is damaged: expected rows with scorer, task", suite)
    (suite / "results.json").write_text("[]")
    refused("expected a task that both a and suite answered, found quiz and none; give", suite)
    for name, content in (("cut", b"PAR1 cut"), ("wrong", None)):
        damaged = answered(tmp_path / name, quiz_acc={"q": 1.0})
        if content is None:
            polars.DataFrame({"value": [1.0]}).write_parquet(damaged / "questions.parquet")
        else:
            (damaged / "questions.parquet").write_bytes(content)
        refused(rf"{name}/questions.parquet is damaged: expected columns scorer, task", damaged)


def test_only_metrics_that_are_means_have_scores_of_questions() -> None:
    """Of what lm_eval returns for a generation with two filters, and a metric of all at once."""
    samples = [
        {
            "doc_id": number,
            "arguments": [(f"prompt {number}", {"until": ["."]})],
            "target": "right",
            "filter": kind,
            "metrics": ["exact_match", "f1", "pair"],
            "exact_match": float(number == 1),
            "f1": number,
            "pair": (0, 1),
        }
        for kind in ("strict", "none")
        for number in range(2)
    ]
    values = {"exact_match,strict": 0.5, "exact_match,none": 0.5, "f1,none": 0.7, "pair,none": 0.5}
    results = {
        "samples": {"made": samples},
        "results": {"made": values},
        "n-samples": {"made": {"effective": 2}},
    }
    found = extract_questions(results, extract_metrics(results))
    assert [(q["metric"], q["value"]) for q in found] == [
        ("exact_match (strict)", 0.0),
        ("exact_match (strict)", 1.0),
        ("exact_match", 0.0),
        ("exact_match", 1.0),
    ]
    assert len({q["question"] for q in found}) == 2


@pytest.mark.parametrize(
    ("asked", "target", "is_known"),
    [
        ([("q", " a"), ("q", " b")], 1, True),
        ([("q", " a"), ("q", " b")], 2, False),
        ([("q", " a"), ("q", " b")], -1, False),
        ([("q", " a"), ("q", " b")], "b", True),
        ([("q", " a"), ("q", " b")], "", False),
        ([("q", " a"), ("q", " b"), ("", " a"), ("", " b")], 2, False),  # and without context
        ([("q a", " end"), ("q b", " end")], "end", True),
        ([("q", " a"), ("q", " b")], [0, 1], True),  # several are right
    ],
)
def test_a_choice_has_a_right_answer(asked: list[Any], target: Any, is_known: bool) -> None:
    sample = {"doc_id": 5, "arguments": asked, "target": target}
    results = {
        "samples": {"made": [sample], "said": [{**sample, "target": -1}]},
        "configs": {
            "made": {"output_type": "multiple_choice"},
            "said": {"output_type": "generate_until"},
        },
    }
    if is_known:
        check_answers(results)
    else:
        with pytest.raises(ValueError, match=r"harness: 'made': document 5 has no answer: .*below"):
            check_answers(results)


def test_a_suite_without_its_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    found = tmp_path / "scores.json"
    found.write_text(json.dumps([row("quiz", "acc", 0.5, 0.1)]))
    polars.DataFrame(schema=QUESTIONS).write_parquet(tmp_path / "questions.parquet")
    member = {"scorer": "ours", "task": "quiz", "metric": "acc", "chance": 0.25}
    asked = {
        "heldout": None,
        "scores": [found],
        "questions": [tmp_path / "questions.parquet"],
        "requests": [],
    }
    made = tmp_path / "eval/one"
    evaluation(**asked, results=made, suites={"SUITE": [member]})
    (suite,) = (one for one in json.loads((made / "results.json").read_text()) if "parts" in one)
    assert suite["value"] == pytest.approx(1 / 3) and suite["stderr"] == pytest.approx(0.1 / 0.75)
    assert "| SUITE | quiz | ours | acc | 0.25 |" in (made / "table.md").read_text()
    twice = {"SUITE": [member, {**member, "task": "q*"}]}
    with pytest.raises(ValueError, match=r"each score in one member, found .*'quiz', 'acc"):
        evaluation(**asked, results=tmp_path / "eval/two", suites=twice)
    evaluation(**asked, results=tmp_path / "eval/pipe", suites={"a | b": [member]})
    assert r"| a \| b | suite | centered" in (tmp_path / "eval/pipe/table.md").read_text()
    absent = {"SUITE": [{**member, "metric": "len_norm"}]}
    with pytest.raises(ValueError, match=r"suites.SUITE: expected a score len_norm of quiz"):
        evaluation(**asked, results=tmp_path / "eval/two", suites=absent)
