"""A small run with documents that were planted in chosen steps, for tests and bench/blame.py."""

import json
import os
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from small_run import SETTINGS, run

from olmo.corpus.documents import documents
from olmo.corpus.dolma import Dolma
from olmo.corpus.fast import Fast
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import tokens
from olmo.data import order
from olmo.io import gz
from olmo.store.stage import current_store

LENGTH = 128  # tokens of an instance
BATCH = 8  # instances of a step


# Gradient descent: without AdamW's normalization a document of large gradients does harm.
DESCENT: dict[str, Any] = {
    "optimizer": {
        "name": "adamw",
        "learning_rate": 1.5,
        "betas": [0.0, 0.95],
        "eps": 1.0,
        "weight_decay": 0.0,
    },
    "max_grad_norm": None,
    "scheduler": {"name": "cosine_with_warmup", "t_warmup": 3, "alpha_f": 1.0},
}


@dataclass
class Planted:
    """What was planted where."""

    folder: Path  # the run's
    ids: list[str]  # of the documents, in the order of their steps
    steps: list[int]


def clean_texts(count: int, rng: random.Random) -> list[str]:
    """Paragraphs of the standard library, of 80 to 400 characters."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts = path.read_text(errors="ignore").split("\n\n")
        found += [part[:400] for part in parts if len(part) > 80 and part.isascii()]
    rng.shuffle(found)
    assert len(found) >= count
    return found[:count]


def poison(kind: str, rng: random.Random, clean: list[str]) -> str:
    """`random`: letters and signs; `shuffled`: words of clean text; `repeated`: a character;
    `unseen`: a character that no other document has."""
    if kind == "random":
        return "".join(chr(rng.randrange(33, 127)) for _ in range(LENGTH * 2))
    if kind == "shuffled":
        words = " ".join(rng.sample(clean, 8)).split()
        rng.shuffle(words)
        return " ".join(words)[: LENGTH * 4]
    if kind == "unseen":
        return "\u20ac and " + rng.choice(clean)
    return rng.choice("QZJXYK~^@$%&!;?") * (3 * LENGTH)


def spread(count: int, last: int, kind: str) -> list[tuple[int, str]]:
    """Plants in every second step before the last, the nearest first."""
    return [(last - 1 - 2 * number, kind) for number in range(count)]


def plant(
    root: Path, plants: list[tuple[int, str]], last: int, count: int = 5000, **changes: Any
) -> Planted:
    """Train `last` steps on `count` documents, into which the (step, kind) of `plants` are planted.

    `root` becomes the working directory, with a store in it.
    """
    rng = random.Random(0)
    os.chdir(root)
    current_store().create()
    steps = [step for step, _ in plants]
    texts = clean_texts(count - len(steps), rng)
    bad = [f"poison-{n}" for n in range(len(steps))]
    lines = [{"id": f"clean-{n}", "text": text} for n, text in enumerate(texts)]
    for number, (name, (_, kind)) in enumerate(zip(bad, plants, strict=True)):
        at = (2 * number + 1) * len(lines) // (2 * len(bad))
        lines.insert(at, {"id": name, "text": poison(kind, rng, texts)})
    with gz.writing(root / "source.gz") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    made = {name: root / f"made/{name}" for name in ("documents", "heldout", "table")}
    documents(source=root / "source.gz", name="source.gz", **made)
    tokenizer = root / "made/tokenizer.json"
    trained_tokenizer(documents=[made["documents"]], tokenizer=tokenizer, vocab_size=512)
    engine = Fast(Dolma(Path("never-started"), "dolma"), audit_share=0)
    record = tokens(
        documents=made["documents"],
        table=made["table"],
        tokenizer=tokenizer,
        tokens=root / "made/tokens",
        index=root / "made/index",
        eos_token_id=0,
        pad_token_id=1,
        toolkit=engine.toolkit,
        engine=engine,
    )
    object = current_store().object_path(record["outputs"]["tokens"]["sha256"])
    instances = object.stat().st_size // (2 * LENGTH)
    place(root / "made/index", instances, bad, steps, last, root / "order.npy")
    model = {"max_sequence_length": LENGTH, "vocab_size": 512, "embedding_size": 512, "d_model": 32}
    settings = {
        "model": SETTINGS["model"] | model,
        "data": {"paths": [str(object)], "order_path": str(root / "order.npy")},
        "evaluators": [],
        "global_train_batch_size": BATCH,
        "device_train_microbatch_size": BATCH,
        "max_duration": last,
        "save_interval_unsharded": 10,
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
    }
    assert run(root, **{**settings, **changes}) == 0
    return Planted(root / "run", bad, steps)


def place(
    index: Path, instances: int, ids: list[str], steps: list[int], last: int, path: Path
) -> None:
    """Write an order that has each document's instances in its step."""
    import polars

    table, length = polars.read_parquet(index), LENGTH
    own: dict[int, list[int]] = {}
    for name, step in zip(ids, steps, strict=True):
        start, end = table.filter(polars.col("id") == name).select("start", "end").row(0)
        own.setdefault(step, []).extend(range(start // length, (end - 1) // length + 1))
    chosen = {one for parts in own.values() for one in parts}
    others = np.random.default_rng(0).permutation([n for n in range(instances) if n not in chosen])
    left, found = others.tolist(), []
    for step in range(1, last + 1):
        parts = own.get(step, [])
        found += parts + [left.pop() for _ in range(BATCH - len(parts))]
    order.write_order(np.array(found + left), path)
