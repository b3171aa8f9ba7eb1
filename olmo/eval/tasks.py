"""The multiple-choice tasks of tasks.yaml: from a document's fields to a model's requests.

    for request in build_requests(load_tasks()["piqa"], folder): …

A request is a context and a continuation; a document has one for each of its options.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from olmo.eval.rows import read_requests, read_rows

# Metrics of the right option alone.
TARGET_METRICS = ("ce_loss", "bpb")


@dataclass(frozen=True)
class ChoiceTask:
    """A task of tasks.yaml. The comment at the top of that file explains the fields."""

    label: str
    metric: str
    requests: str = ""  # folder of prepared requests; then the fields below are empty
    dataset: str = ""
    hub: str | None = None
    configs: tuple[str | None, ...] = (None,)
    split: str = "validation"
    options: str = ""
    target: str = ""
    context: str = ""
    continuation: str = "{{ option }}"
    unconditional: str = " "
    shots: tuple[int | None, ...] = (None,)
    shots_split: str = ""
    preamble: str = ""


class Request(NamedTuple):
    document: int
    option: int
    context: str
    continuation: str  # with a space before it
    unconditional: str
    target: int  # the option that is right


@functools.cache
def load_tasks() -> dict[str, ChoiceTask]:
    """All tasks by label."""
    import yaml

    entries = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))
    found = []
    for folder, names in entries.pop("requests").items():
        for name, metric in names.items():
            label, where = f"{folder}_{name}", f"{folder}/{name}"
            found += [ChoiceTask(label, metric, where), ChoiceTask(f"{label}_bpb", "bpb", where)]
    for entry, fields in entries.items():
        groups = fields.pop("groups", None)
        variants = fields.pop("variants", {"": {}})
        by_suffix = (
            {f"_{name}": configs for name, configs in groups.items()} if groups else {"": None}
        )
        config = fields.pop("config", None)
        for group, configs in by_suffix.items():
            for variant, changes in variants.items():
                settings = fields | changes | {"configs": tuple(configs or [config])}
                settings["shots"] = tuple(settings.get("shots", [None]))
                found.append(ChoiceTask(label=f"{entry}{group}{variant}", **settings))
    assert len({task.label for task in found}) == len(found)
    return {task.label: task for task in found}


def find_task(label: str) -> ChoiceTask:
    """The task of this label. Raises ValueError with the most similar ones."""
    if label not in load_tasks():
        near = difflib.get_close_matches(label, load_tasks(), 3) or [
            "piqa",
            "hellaswag",
            "arc_easy",
        ]
        raise ValueError(
            f"evaluators: there is no downstream task '{label}'; did you mean {', '.join(near)}? "
            "olmo/eval/tasks.yaml has all of them"
        )
    return load_tasks()[label]


def build_requests(task: ChoiceTask, folder: Path | None) -> list[Request]:
    """The requests of a task, document by document.

    Raises ValueError if the data set is neither in `folder` nor available from the hub.
    """
    if task.requests:
        rows = read_requests(task.label, task.requests, folder)
        found = [
            Request(
                row["doc_id"],
                row["idx"],
                row["request"]["context"],
                row["request"]["continuation"],
                task.unconditional,
                row["label"],
            )
            for row in rows
            if row["doc_id"] < FIRST_UNCONDITIONAL
        ]
    else:
        from jinja2 import UndefinedError

        try:
            found = list(_requests_from_documents(task, folder))
        except (UndefinedError, TypeError, AttributeError) as error:  # a field of another type
            raise ValueError(
                f"evaluators: '{task.label}': a document of {task.dataset} does not have the "
                f"fields that tasks.yaml expects: {error}"
            ) from error
    if not found:
        raise ValueError(f"evaluators: '{task.label}': expected documents, found an empty data set")
    if task.metric in TARGET_METRICS:
        found = [r._replace(option=0, target=0) for r in found if r.option == r.target]
    return found


# From this document number on, prepared requests repeat the continuations without contexts.
FIRST_UNCONDITIONAL = 1_000_000


def _requests_from_documents(task: ChoiceTask, folder: Path | None) -> Iterator[Request]:
    jinja = _jinja_environment()
    options = jinja.compile_expression(task.options, undefined_to_none=False)
    target = jinja.compile_expression(task.target, undefined_to_none=False)
    context, continuation, unconditional, preamble = (
        jinja.from_string(text).render
        for text in (task.context, task.continuation, task.unconditional, task.preamble)
    )
    number = 0
    for config in task.configs:
        source = (task.label, task.dataset, task.hub or task.dataset, config)
        examples = []
        if task.shots != (None,):
            for row in read_rows(*source, task.shots_split, folder):
                option = options(row)[target(row)]
                solved = f"{context(row, option=option)} {continuation(row, option=option)}\n\n"
                examples.append(solved)
        for row in read_rows(*source, task.split, folder):
            for shots in task.shots:
                before = "" if shots is None else preamble(row) + "".join(examples[:shots])
                choices, right = options(row), target(row)
                if not isinstance(right, int) or not 0 <= right < len(choices):
                    raise ValueError(
                        f"evaluators: '{task.label}': document {number} of {task.dataset} has no "
                        f"answer: expected a number below {len(choices)}, found {right!r}. Name a "
                        "split whose answers are public"
                    )
                for i, option in enumerate(choices):
                    yield Request(
                        number,
                        i,
                        before + context(row, option=option),
                        " " + continuation(row, option=option),
                        unconditional(row, option=option),
                        right,
                    )
                number += 1


@functools.cache
def _jinja_environment() -> Any:
    """A sandboxed Jinja in which a missing field is an error."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    jinja.filters |= {"wikihow": strip_markup, "joined": join_punctuation}
    return jinja


def strip_markup(text: str) -> str:
    """Remove the markup that WikiHow's pages left in HellaSwag.

    >>> strip_markup("Cook rice. [header] How [title] Boil water")
    'Cook rice. How. Boil water'
    """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def join_punctuation(text: str) -> str:
    """Join the punctuation of GLUE's sentences to the words, as they were written.

    >>> join_punctuation("It did n't ( yet ) work , she said .")
    "It didn't (yet) work, she said."
    """
    for split, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(split, joined)
    return re.sub(r" (['.,])", r"\1", text)
