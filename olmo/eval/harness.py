"""EleutherAI's lm-evaluation-harness (lm_eval) on an exported model.

Its own tasks come from the hub; those of tasks.yaml whose documents are here, and task files of
one's own, need no network.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from olmo.eval.final import nan_to_none
from olmo.eval.tasks import TARGET_METRICS, ChoiceTask, build_requests


def write_task(task: ChoiceTask, data: Path, folder: Path) -> None:
    """One of our tasks as one of the harness's: <label>.yaml and <label>.jsonl in `folder`.

    The documents are written as we ask them, so that both scorers see the same text.

    Raises:
        ValueError: its documents are not in `data`, or its context depends on the option, which
            the harness's multiple choice has no place for.
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
                f"harness: '{task.label}' has a context for each option, which lm-eval's "
                "multiple_choice has not; ask it by `choices`"
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
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ask an exported model; the metrics, and each request with its log-likelihood in nats.

    Args:
        model: a folder that transformers reads.
        names: of tasks and groups, the harness's own or of `task_files`.
        task_files: folders of task files (YAML).
        limit: the first so many documents of each task; None: all of them.

    Raises:
        ValueError: there is no such task, it is broken, or its data is not to be had.
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
            f"own; task files are looked for in {', '.join(folders) or 'no folder'}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with silence_output():
        asked = HFLM(pretrained=str(model), device=device, batch_size=batch_size, dtype="auto")
    try:
        with silence_output():
            found = lm_eval.simple_evaluate(
                asked, tasks=list(names), task_manager=known, limit=limit, bootstrap_iters=1000
            )
    except OverflowError as error:
        raise ValueError(
            f"harness: {', '.join(names)}: lm-eval computes no perplexity beyond 1.8e308, and the "
            "model's loss there is above 709 nats: it diverged, or its tokenizer is another's"
        ) from error
    except Exception as error:  # tasks raise what they like: their files are code of others'
        first = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"harness: {', '.join(names)}: {first[0] if first else type(error).__name__}. Where "
            "the hub cannot be reached, give task files of local data (`task_files`), or take "
            "the task out"
        ) from error
    return extract_metrics(found), extract_requests(found)


def silence_output() -> AbstractContextManager[Any]:
    """Its progress bars are for a terminal, and its remarks for nobody; its errors are kept."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def extract_metrics(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task and metric; a group's are rows too."""
    rows = []
    for task, values in found["results"].items():
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
                    "documents": found["n-samples"].get(task, {}).get("effective"),
                }
            )
    return rows


def extract_requests(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each text whose likelihood was asked for; generated texts are not among them."""
    rows = []
    for task, samples in found["samples"].items():
        for sample in samples:
            for option, (asked, answer) in enumerate(
                zip(sample["arguments"], sample["filtered_resps"], strict=False)
            ):
                if isinstance(answer, tuple | list) and isinstance(answer[0], float):
                    rows.append(
                        {
                            "task": task,
                            "document": sample["doc_id"],
                            "option": option,
                            "context": asked[0],
                            "continuation": asked[1],
                            "loglikelihood": answer[0],
                        }
                    )
    return rows
