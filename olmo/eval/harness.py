"""Runs EleutherAI's lm-evaluation-harness (lm_eval) on an exported model.

Its own tasks come from the hub, or from local copies in OLMo's layout (olmo.eval.rows). Tasks of
tasks.yaml with local documents, and the user's own task files, need no network.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from olmo.eval.final import Answers, nan_to_none
from olmo.eval.questions import digest_question
from olmo.eval.rows import read_local_splits
from olmo.eval.tasks import TARGET_METRICS, ChoiceTask, build_requests


def write_task(task: ChoiceTask, data: Path, folder: Path) -> None:
    """Write one of our tasks as a harness task: <label>.yaml and <label>.jsonl in `folder`.

    The documents are written with our prompts, so that both scorers read the same text.

    Raises ValueError if its documents are not in `data`, or if its context depends on the option,
    which the harness's multiple choice cannot express.
    """
    import yaml

    if task.metric in TARGET_METRICS:
        raise ValueError(f"harness: '{task.label}' has no options to choose from; use `choices`")
    documents: dict[int, dict[str, Any]] = {}
    for request in build_requests(task, data):
        row = documents.setdefault(
            request.document, {"context": request.context, "choices": [], "answer": request.target}
        )
        if row["context"] != request.context:
            raise ValueError(
                f"harness: '{task.label}' has a context for each option, but lm-eval's "
                "multiple_choice has one; use `choices`"
            )
        row["choices"].append(request.continuation.removeprefix(" "))
    file = folder / f"{task.label}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in documents.values()))
    settings = {
        "task": task.label,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    }
    (folder / f"{task.label}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def run_harness(
    model: Path,
    names: Sequence[str],
    task_files: Sequence[Path],
    batch_size: int = 8,
    limit: int | None = None,
    copies: Path | None = None,
) -> Answers:
    """Evaluate an exported model: the metrics, of all questions and of each, and each request.

    Args:
        model: a folder that transformers reads.
        names: tasks and groups, the harness's own or from `task_files`.
        task_files: folders of task files (YAML).
        limit: only the first so many documents of each task; None: all.
        copies: folder of data sets in OLMo's layout; what it does not have comes from the hub.

    Raises ValueError for an unknown or broken task, if its data is not available, or if its
    documents have no answers.
    """
    with silence_output():
        import lm_eval
        import torch
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in task_files]
    known = TaskManager(include_path=folders, include_defaults=False) if folders else None
    if known is None or not set(names) <= set(known.all_tasks):
        known = TaskManager(include_path=folders or None)  # seconds: it reads 10,000 files
    if unknown := sorted(set(names) - set(known.all_tasks)):
        raise ValueError(
            f"harness: there is no task '{unknown[0]}'. `lm-eval ls tasks` names the harness's "
            f"own; folders with task files: {', '.join(folders) or 'none'}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with silence_output():
        lm = HFLM(pretrained=str(model), device=device, batch_size=batch_size, dtype="auto")
    try:
        with silence_output(), read_copies(copies):
            results = lm_eval.simple_evaluate(
                lm, tasks=list(names), task_manager=known, limit=limit, bootstrap_iters=1000
            )
    except OverflowError as error:
        raise ValueError(
            f"harness: {', '.join(names)}: lm-eval computes no perplexity above 1.8e308, and the "
            "model's loss is above 709 nats: it diverged, or its tokenizer is another model's"
        ) from error
    except Exception as error:  # task files are other people's code
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"harness: {', '.join(names)}: {first[0] if first else type(error).__name__}. Without "
            "access to the hub, give task files of local data (`task_files`), or remove the task"
        ) from error
    check_answers(results)
    scores = extract_metrics(results)
    return Answers(scores, extract_questions(results, scores), extract_requests(results))


@contextmanager
def read_copies(folder: Path | None) -> Iterator[None]:
    """Data sets that lm_eval loads by their hub's name come from `folder` if they are there."""
    import datasets

    from_hub = datasets.load_dataset

    def load(path: str, name: str | None = None, **settings: Any) -> Any:
        splits = read_local_splits(path, name, folder) if folder else {}
        if not splits:
            return from_hub(path, name, **settings)
        found = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        return datasets.DatasetDict(found)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = from_hub


def silence_output() -> AbstractContextManager[Any]:
    """Hide lm_eval's progress bars where there is no terminal, and its log below errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def extract_metrics(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task or group and metric of lm_eval's results."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "metric": name if kind == "none" else f"{name} ({kind})",
                    "value": float(value),
                    "stderr": nan_to_none(stderr) if isinstance(stderr, int | float) else None,
                    "documents": results["n-samples"].get(task, {}).get("effective"),
                }
            )
    return rows


def check_answers(results: dict[str, Any]) -> None:
    """Raise ValueError for a choice without a right answer: lm_eval would count it as wrong."""
    for task, samples in results["samples"].items():
        if results["configs"].get(task, {}).get("output_type") != "multiple_choice":
            continue
        for sample in samples:
            asked = [tuple(request[:2]) for request in sample["arguments"]]
            options = [text.strip() for context, text in asked if context == asked[0][0]]
            right = sample["target"]
            if isinstance(right, int) and (len(options) > 1 or right < 0):
                is_known = 0 <= right < len(options)
            else:  # the answer's text; of a context for each option it is what follows them
                is_known = not isinstance(right, str) or right.strip() in options
            if not is_known:
                raise ValueError(
                    f"harness: '{task}': document {sample['doc_id']} has no answer: expected a "
                    f"number below {len(options)}, or an option, found {right!r}. Name a split "
                    "whose answers are public"
                )


def extract_questions(
    results: dict[str, Any], scores: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each question and metric, of metrics that are means over questions."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            kind = sample.get("filter", "none")
            question = digest_question(sample["arguments"], sample["target"])
            for name in sample["metrics"]:
                if isinstance(value := sample.get(name), int | float):
                    metric = name if kind == "none" else f"{name} ({kind})"
                    row = {"metric": metric, "question": question, "value": float(value)}
                    found.setdefault((task, metric), []).append({"task": task, **row})
    means = {(row["task"], row["metric"]): row["value"] for row in scores}
    rows = []
    for key, asked in found.items():
        mean = sum(row["value"] for row in asked) / len(asked)
        if math.isclose(mean, means.get(key, math.nan), rel_tol=1e-9, abs_tol=1e-12):
            rows += asked
    return rows


def extract_requests(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each request with a log-likelihood of lm_eval's results; no generated texts."""
    rows = []
    for task, samples in results["samples"].items():
        for sample in samples:
            for option, (arguments, answer) in enumerate(
                zip(sample["arguments"], sample["filtered_resps"], strict=False)
            ):
                if isinstance(answer, tuple | list) and isinstance(answer[0], float):
                    rows.append(
                        {
                            "task": task,
                            "document": sample["doc_id"],
                            "option": option,
                            "context": arguments[0],
                            "continuation": arguments[1],
                            "loglikelihood": answer[0],
                        }
                    )
    return rows
