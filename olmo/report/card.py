"""The model card of an export: its architecture, training, evaluation, provenance and use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from olmo.config import TrainConfig
from olmo.store.lineage import ancestors
from olmo.store.record import Record, parse_record
from olmo.store.store import Store

LIBRARY = ("stdlib", "stdlib_questions")
CHECKPOINTS = ("local_checkpoint", "fetched_checkpoint")
SOURCES = (
    *("download", "download_tokens", "download_conversations", *LIBRARY),
    *("local_source", "local_tokens", "local_conversations", *CHECKPOINTS),
    *("fetched", "converted"),
)
MAX_SOURCES = 20  # listed in the card

HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [olmo]
---

# {name}

{kind}, {parameters:,} parameters, {made}.

```python
from transformers import pipeline

pipeline("text-generation", model="<this folder>")("Once", max_new_tokens=32)
```

`config.yaml` is the training config. The checkpoint's own weights, bit for bit:
`olmo checkpoint convert <this folder> back --kind safetensors`.
"""


def card(
    name: str, settings: dict[str, Any], parameters: int, checkpoint: Path, store: Store
) -> str:
    """README.md of an export, as the Hugging Face hub expects it.

    Args:
        settings: the content of config.json.
        checkpoint: the final folder that was exported, with its record.
    """
    record = parse_record((checkpoint / "record.json").read_bytes(), checkpoint / "record.json")
    cfg = TrainConfig.load(checkpoint / "config.yaml", untrusted=True)
    facts = record["facts"]
    per_step = cfg.global_train_batch_size * cfg.model.max_sequence_length
    rows = {
        "Layers, width, heads": f"{cfg.model.n_layers}, {cfg.model.d_model}, {cfg.model.n_heads}",
        "Sequence length": f"{cfg.model.max_sequence_length:,}",
        "Vocabulary": f"{cfg.model.vocab_size:,}",
        "Steps": f"{facts['steps']:,}, of {per_step:,} tokens each" if "steps" in facts else "",
        "Optimizer": f"{cfg.optimizer.name}, learning rate {cfg.optimizer.learning_rate:g}, "
        f"weight decay {cfg.optimizer.weight_decay:g}; {cfg.scheduler.name}",
        "Precision": f"{cfg.precision}; the weights here are {settings['dtype']}",
        "Seed": str(cfg.seed),
    }
    made = (
        f"{facts['tokens']:,} tokens of training"
        if "tokens" in facts
        else f"the mean of {facts['checkpoints']} checkpoints"  # of a soup
    )
    parts = [
        HEAD.format(
            name=name,
            kind=settings["architectures"][0],
            parameters=parameters,
            made=made,
        ),
        "## Training\n",
        format_table(("", ""), [row for row in rows.items() if row[1]]),
        "## Evaluation\n",
        _evaluation(facts.get("heldout_loss", {}), name, facts.get("heldout_bits_per_byte", {})),
        "## Where it comes from\n",
        _lineage(record, store),
    ]
    return "\n".join(parts)


def format_table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    head = list(head)
    cells = ([str(cell).replace("|", r"\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _evaluation(
    losses: dict[str, dict[str, float]],
    name: str,
    bits_per_byte: Mapping[str, dict[str, float]] | None = None,
) -> str:
    if not losses:
        return f"None so far: `snakemake eval/{name}`.\n"
    rows = [
        (label, *(f"{float(loss[when]):.4f}" for when in ("first", "last")))
        for label, loss in losses.items()
    ]
    rows += [
        (f"{label}, bits per byte", *(f"{float(bits[when]):.4f}" for when in ("first", "last")))
        for label, bits in (bits_per_byte or {}).items()
    ]
    return (
        "Loss (nats per token) on documents that it was not trained on:\n\n"
        + format_table(("held-out set", "before", "after"), rows)
        + f"\nMore by `snakemake eval/{name}`.\n"
    )


def _lineage(record: Record, store: Store) -> str:
    """The stages that the checkpoint was made by, and their source files."""
    counts: Counter[str] = Counter()
    sources = []
    for _, found in ancestors(store, record):
        stage = f"{found['action']['stage']} (version {found['action']['version']})"
        counts[stage] += 1
        if found["action"]["stage"] in SOURCES:
            sources.append(found)
    # What was fetched and then converted is one source.
    arrived = {found["facts"].get("sha256") for found in sources}
    sources = [s for s in sources if not (of := converted_files(s)) or set(of) - arrived]
    lines = [
        f"Checkpoint `{record['content']}`, by action `{record['key']}`; its stages, last first:\n",
        format_table(("stage", "actions"), counts.items()),
        f"The first {MAX_SOURCES} of {len(sources):,} sources:\n"
        if len(sources) > MAX_SOURCES
        else "Sources:\n",
        format_table(("source", "sha256", "licence"), map(_source, sources[:MAX_SOURCES])),
    ]
    return "\n".join(lines)


def converted_files(record: Record) -> list[str]:
    """The digests of the files that a source was converted from."""
    is_converted = record["action"]["stage"] == "converted"
    return record["action"]["inputs"]["files"] if is_converted else []


def _source(record: Record) -> tuple[str, str, str]:
    facts, params = record["facts"], record["action"]["params"]
    stage = record["action"]["stage"]
    if stage in CHECKPOINTS:
        weights = record["outputs"]["checkpoint"]["files"]["model.safetensors"]
        name = facts["from"] if stage == "fetched_checkpoint" else "a local checkpoint"
        return name, f"`{weights['sha256']}`", ""
    if stage in LIBRARY:
        name = f"standard library of {facts['implementation']} {facts['python']}"
        return name, f"`{params['library']}`", facts["licence"]
    files = converted_files(record)
    if len(files) > 1:
        return f"{len(files):,} local files", "", ""
    digests = (*files, *record["action"]["inputs"].values())
    digest = facts.get("sha256") or next((d for d in digests if isinstance(d, str)), "")
    return facts.get("url", "a local file"), f"`{digest}`" if digest else "", ""
