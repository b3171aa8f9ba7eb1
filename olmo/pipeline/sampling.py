"""Samples of data sets (olmo.corpus.sample): what the rule needs, and what `olmo plan` takes."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo.config.strict import hashed_fields
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import json_flag, recipe_path
from olmo.pipeline.source_files import local_files, source_table_path

TOKEN_BYTES = 2  # of uint16, as olmo.pipeline.forecast counts


def sample_inputs(plan: Plan, dataset: str) -> list[str]:
    """What `olmo sample` reads besides a tokenizer: the table of sources, or local files."""
    sources = plan.recipe(dataset).sources
    if sources.files:
        return local_files(plan.sources(dataset))
    has_table = sources.table or sources.url_list
    return [str(source_table_path(dataset, sources))] if has_table else []


def given_tokenizer(plan: Plan, dataset: str) -> list[str]:
    """The tokenizer of a data set, if nothing has to be trained for it; else []."""
    return [f"data/{dataset}/tokenizer.json"] * (not _waits_for_training(plan, dataset))


def _waits_for_training(plan: Plan, dataset: str) -> bool:
    file = plan.recipe(dataset).tokenizer.file
    is_other = file is not None and file != plan.tokenizer_name(dataset)
    return plan.trains_tokenizer(dataset) or is_other


def sample_flags(plan: Plan, dataset: str) -> str:
    """The flags of `olmo sample`: sources, documents, and a tokenizer that is here already.

    Raises:
        ValueError: the data set has conversations or token files.
    """
    if reason := why_no_sample(plan, dataset):
        raise ValueError(
            f"{recipe_path(dataset)}: expected documents to sample, found {reason}; `olmo plan` "
            "takes fixed rates for them"
        )
    recipe = plan.recipe(dataset)
    words = ["--table", str(source_table_path(dataset, recipe.sources))]
    words *= bool(recipe.sources.table or recipe.sources.url_list)
    tokenizer = f"data/{dataset}/tokenizer.json"
    if Path(tokenizer).exists() or not _waits_for_training(plan, dataset):
        words += ["--tokenizer", tokenizer]
    flags = [json_flag("recipe", recipe.sources), json_flag("config", recipe.documents)]
    return " ".join([*flags, shlex.join(words)])


def why_no_sample(plan: Plan, dataset: str) -> str | None:
    """What a data set has that cannot be sampled; None for documents from files."""
    if dataset in plan.tokenized_datasets:
        return "token files"
    recipe = plan.recipe(dataset)
    if recipe.instructions is not None:
        return "conversations"
    sources = recipe.sources
    return None if sources.files or sources.table or sources.url_list else "text that is generated"


@dataclass(frozen=True)
class Sample:
    """The estimates of a data set, all its groups together."""

    total: dict[str, Any]

    @classmethod
    def find(cls, plan: Plan, dataset: str) -> Sample | None:
        """A data set's sample; None if there is none, or one of another recipe."""
        path = Path(f"data/{dataset}/sample.json")
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        is_current = found["documents"] == hashed_fields(plan.recipe(dataset).documents)
        return cls(found["total"]) if is_current else None

    def outputs(self, stage: str, read: int, heldout_share: float) -> dict[str, float]:
        """Bytes of a stage's outputs, as far as the sample tells, by the bytes that it reads."""
        found = {name: made["expected"] for name, made in self.total.items() if is_amount(made)}
        if stage == "converted":
            return {"source": read * found["source_bytes"] / self.total["bytes"]}
        if stage == "documents":
            kept = read * found["documents_bytes"] / found["source_bytes"]
            return {"documents": kept, "heldout": kept * heldout_share / (1 - heldout_share)}
        if stage == "tokens" and "tokens" in found and found["documents_bytes"]:
            return {"tokens": read * TOKEN_BYTES * found["tokens"] / found["documents_bytes"]}
        return {}

    def documents(self, read: int) -> float:
        """The documents of so many bytes of sources."""
        total = self.total
        return float(read * total["documents"]["expected"] / total["source_bytes"]["expected"])

    def spread(self, amount: str) -> tuple[float, float]:
        """The range of an amount, as shares of what is expected."""
        found = self.total[amount]
        if not found or not found["expected"]:
            return 1.0, 1.0
        return found["low"] / found["expected"], found["high"] / found["expected"]


def is_amount(value: Any) -> bool:
    return isinstance(value, dict) and "expected" in value
