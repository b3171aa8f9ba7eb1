"""CORE and OLMES through lm-evaluation-harness, on a few made rows in each data set's format."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_huggingface import OLMO2, checkpoint

from olmo.eval.final import Answers
from olmo.eval.harness import run_harness
from olmo.eval.questions import score_suite
from olmo.pipeline.convert import convert
from olmo.pipeline.recipe import EvaluationConfig

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "config/eval/tasks"
WORDS = [*("red", "blue", "green", "black", "white"), *map("number {}".format, range(7))]


def words(row: int, count: int) -> str:
    return " ".join(WORDS[(row * 5 + i * (row + 1)) % len(WORDS)] for i in range(count))


def options(row: int, count: int) -> list[str]:
    return [f"{WORDS[(row + i) % len(WORDS)]} {i}" for i in range(count)]


def labelled(row: int, count: int) -> dict[str, list[str]]:
    return {"text": options(row, count), "label": list("ABCDE")[:count]}


# A row of each data set of the hub, by its number: the fields that the task files read.
HUB: dict[tuple[str, str], Callable[[int], dict[str, Any]]] = {
    ("allenai/ai2_arc", "ARC-Easy"): lambda n: {
        "question": words(n, 5),
        "choices": labelled(n, 4),
        "answerKey": "ABCD"[n % 4] if n % 3 else str(n % 4 + 1),
    },
    ("aps/super_glue", "boolq"): lambda n: {
        "passage": words(n, 9),
        "question": words(n, 4),
        "label": n % 2,
    },
    ("tau/commonsense_qa", "none"): lambda n: {
        "question": words(n, 5),
        "choices": labelled(n, 5),
        "answerKey": "ABCDE"[n % 5],
    },
    ("Rowan/hellaswag", "none"): lambda n: {
        "activity_label": "Cooking",
        "ctx_a": f"{words(n, 3)} [header] how [title] {words(n, 2)}",
        "ctx_b": "the cook",
        "endings": [f"{option} [step] ends" for option in options(n, 4)],
        "label": str(n % 4),
    },
    ("allenai/openbookqa", "main"): lambda n: {
        "question_stem": words(n, 4),
        "choices": labelled(n, 4),
        "answerKey": "ABCD"[n % 4],
    },
    ("ybisk/piqa", "plain_text"): lambda n: {
        "goal": words(n, 4),
        "sol1": words(n, 3),
        "sol2": words(n + 1, 4),
        "label": n % 2,
    },
    ("allenai/social_i_qa", "none"): lambda n: {
        "context": words(n, 4),
        "question": words(n, 3),
        **dict(zip(("answerA", "answerB", "answerC"), options(n, 3), strict=True)),
        "label": str(n % 3 + 1),
    },
    ("allenai/winogrande", "winogrande_xl"): lambda n: {
        "sentence": f"{words(n, 3)} because _ was {words(n, 2)}.",
        "option1": "Ann",
        "option2": "Bob",
        "answer": str(n % 2 + 1),
    },
    ("cais/mmlu", "anatomy"): lambda n: {
        "question": words(n, 5),
        "subject": "anatomy",
        "choices": options(n, 4),
        "answer": n % 4,
    },
}
SAME_FORMAT = {("allenai/ai2_arc", "ARC-Challenge"): ("allenai/ai2_arc", "ARC-Easy")}
# And of each kind of DCLM's files.
DCLM: dict[str, Callable[[int], dict[str, Any]]] = {
    "doc_to_choice: {{choices}}": lambda n: {
        "query": words(n, 5),
        "choices": options(n, 4),
        "gold": n % 4,
    },
    "doc_to_choice: {{context_options}}": lambda n: {
        "context_options": [f"{words(n, 3)} {name}" for name in ("Ann", "Bob")],
        "continuation": words(n, 3),
        "gold": n % 2,
    },
    "doc_to_choice: none": lambda n: {"context": words(n, 6) + " ", "continuation": words(n, 1)},
}


def tasks_of(file: Path) -> Iterator[dict[str, Any]]:
    """The tasks of a group's file with all their settings, of its groups as well."""

    def inside(group: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
        shared = {key: value for key, value in group.items() if key not in ("group", "task")}
        for one in group["task"]:
            if "group" in one:
                yield from inside({**shared, **one}, f"{name}::{one['group']}")
            else:
                yield {**shared, **one, "task": f"{name}::{one['task']}"}

    group = yaml.safe_load(file.read_text())
    return inside(group, group["group"])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("export")
    checkpoint(folder / "final", OLMO2)
    return convert(folder / "final", folder / "hf", kind="hf", tokenizer=tokenizer)


def check(found: Answers, config: EvaluationConfig, expected: set[str]) -> dict[str, Any]:
    """Every task has its questions, whose means are the table's scores; returns the suites."""
    assert {row["task"] for row in found.scores} == expected
    for row in found.scores:
        of = [
            question["value"]
            for question in found.questions
            if (question["task"], question["metric"]) == (row["task"], row["metric"])
        ]
        assert len(of) == row["documents"]
        assert sum(of) / len(of) == pytest.approx(row["value"], abs=1e-12)
    scores = [{"scorer": "lm-eval", **row} for row in found.scores]
    suites = {
        name: score_suite(name, [vars(member) for member in members], scores)
        for name, members in config.suites.items()
    }
    for suite in suites.values():
        assert sum(part["weight"] for part in suite["parts"]) == pytest.approx(1)
        assert all(math.isfinite(suite[key]) for key in ("value", "stderr"))
    return suites


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("suites: [a]", "suites: expected a mapping, found"),
        ("suites: {S: []}", "suites.S: expected tasks, found none"),
        ("suites: {S: [{task: quiz, metric: acc, scorer: me}]}", "expected ours or lm-eval, found"),
        ("choices: [piqa, piqa]", "choices: expected each name once, found piqa twice"),
        ("heldout: [a, b, a]", "heldout: expected each name once, found a twice"),
        (
            "harness: [piqa]\nsuites: {S: [{task: piqa, metric: acc}, {task: piqa, metric: acc}]}",
            "suites.S: expected each name once, found lm-eval piqa acc twice",
        ),
        (
            "choices: [piqa]\nsuites: {S: [{task: copa, metric: acc, scorer: ours}]}",
            "suites.S: expected copa in choices, found piqa; name it there, or correct its scorer",
        ),
        (
            "choices: [piqa]\nsuites: {S: [{task: piqa, metric: acc}]}",
            "suites.S: expected piqa in harness, found none",
        ),
    ],
)
def test_mistakes_in_evaluations(text: str, message: str, tmp_path: Path) -> None:
    """Said before anything is measured."""
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        EvaluationConfig.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_core(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = EvaluationConfig.load(ROOT / "config/eval/core.yaml")
    tasks = list(tasks_of(TASKS / "core/core.yaml"))
    assert len(tasks) == 22 == len(config.suites["CORE"])
    assert {member.task for member in config.suites["CORE"]} == {task["task"] for task in tasks}
    for task in tasks:
        row = DCLM[f"doc_to_choice: {task.get('doc_to_choice', 'none')}"]
        path = Path(task["dataset_kwargs"]["data_files"]["test"])
        write_lines(path, [row(n) for n in range(12)])
    found = run_harness(hf, config.harness, [TASKS / "core", tmp_path / "data/core"], limit=3)
    suite = check(found, config, {task["task"] for task in tasks})["CORE"]
    assert suite["documents"] == 66 and len(suite["parts"]) == 22
    scores = {(row["task"], row["metric"]): row["value"] for row in found.scores}
    centered = [
        (scores[member.task, member.metric] - member.chance) / (1 - member.chance)
        for member in config.suites["CORE"]
    ]
    assert suite["value"] == pytest.approx(sum(centered) / 22)
    asked = {row["task"].rpartition("_")[2]: row for row in found.requests if row["document"] == 0}
    # Ten solved examples, none of them the question itself.
    context = asked["squad"]["context"]
    assert context.count("\n\n") == 10 and context.endswith(words(0, 6))
    assert context.count(words(0, 6)) == 1
    assert asked["squad"]["continuation"] == " " + words(0, 1)
    assert asked["jeopardy"]["continuation"] == "\nAnswer: " + words(0, 1)
    assert asked["jeopardy"]["context"].count("\nAnswer: ") == 10
    assert asked["piqa"]["continuation"].startswith("\nAnswer: ")
    assert asked["winograd"]["context"] == f"{words(0, 3)} Bob"


@pytest.mark.slow
def test_olmes(hf: Path, tmp_path: Path) -> None:
    config = EvaluationConfig.load(ROOT / "config/eval/olmes.yaml")
    files = {form: TASKS / f"olmes/olmes_{form}.yaml" for form in ("cloze", "mc")}
    tasks = {form: list(tasks_of(file)) for form, file in files.items()}
    assert {form: len(found) for form, found in tasks.items()} == {"cloze": 66, "mc": 66}
    for task in (*tasks["cloze"], *tasks["mc"]):
        place = (task["dataset_path"], task.get("dataset_name", "none"))
        name = SAME_FORMAT.get(place, (place[0], "anatomy") if "mmlu" in place[0] else place)
        for split in (task["test_split"], task["fewshot_split"]):
            rows = [HUB[name](n + 20 * (split == task["test_split"])) for n in range(6)]
            folder = tmp_path / "hf_datasets" / place[0] / place[1] / split
            write_lines(folder / "rows.jsonl", rows)
    found = run_harness(hf, config.harness, [TASKS / "olmes"], limit=2, copies=tmp_path)
    expected = {task["task"] for of in tasks.values() for task in of}
    suites = check(found, config, expected)
    assert [len(suite["parts"]) for suite in suites.values()] == [66, 66]
    (mmlu,) = {part["weight"] for part in suites["OLMES cloze"]["parts"] if "mmlu" in part["task"]}
    assert mmlu == pytest.approx(1 / 10 / 57), "the mean over subjects counts as one task"

    asked = {row["task"]: row for row in found.requests if not row["document"] and row["context"]}
    arc = HUB["allenai/ai2_arc", "ARC-Easy"]
    lines = [f" {'ABCD'[i]}. {option}\n" for i, option in enumerate(options(20, 4))]
    expected_end = f"Question: {words(20, 5)}\n{''.join(lines)}Answer:"
    assert asked["olmes_mc::olmes_arc_easy"]["context"].split("\n\n")[-1] == expected_end
    assert asked["olmes_mc::olmes_arc_easy"]["continuation"] == " D"
    shots = asked["olmes_cloze::olmes_arc_easy"]["context"].split("\n\n")
    solved = [f"Question: {words(n, 5)}\nAnswer: {options(n, 4)[n % 4]}" for n in range(5)]
    assert shots[:-1] == solved and arc(3)["answerKey"] == "4"
    assert "[" not in asked["olmes_cloze::olmes_hellaswag"]["context"]
    assert (
        f"{words(20, 3)} how. {words(20, 2)} The cook"
        in (asked["olmes_mc::olmes_hellaswag"]["context"])
    )
    assert asked["olmes_cloze::olmes_winogrande"]["context"].endswith("because Bob")
    assert asked["olmes_mc::mmlu::anatomy"]["context"].startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nQuestion: "
    )


@pytest.mark.slow
@pytest.mark.parametrize("gold", [-1, 7])
def test_answers_that_are_not_public(
    gold: int, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval itself would count them as wrong."""
    monkeypatch.chdir(tmp_path)
    task = next(tasks_of(TASKS / "core/core.yaml"))
    rows = [DCLM["doc_to_choice: {{choices}}"](n) for n in range(3)]
    write_lines(Path("data/hidden.jsonl"), [*rows, {**rows[0], "gold": gold}])
    settings = {"dataset_kwargs": {"data_files": {"test": "data/hidden.jsonl"}}, "task": "hidden"}
    shared = {"dataset_path": "json", "test_split": "test"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/hidden.yaml").write_text(yaml.safe_dump({**task, **shared, **settings}))
    said = rf"harness: 'hidden': document 3 has no answer: expected .*, found '?{gold}'?\."
    with pytest.raises(ValueError, match=said):
        run_harness(hf, ["hidden"], [tmp_path / "tasks"])
