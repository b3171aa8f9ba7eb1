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

from olmo.config import TrainConfig
from olmo.corpus.documents import documents
from olmo.corpus.dolma import Dolma
from olmo.corpus.fast import Fast
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.corpus.tokens import tokens
from olmo.data import order
from olmo.io import gz
from olmo.store.stage import current_store

T = 128  # tokens of an instance
G = 8  # instances of a step


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
    """`random`: letters and signs; `shuffled`: words of clean text; `repeated`: a word."""
    if kind == "random":
        return "".join(chr(rng.randrange(33, 127)) for _ in range(T * 2))
    if kind == "shuffled":
        words = " ".join(rng.sample(clean, 8)).split()
        rng.shuffle(words)
        return " ".join(words)[: T * 4]
    return f" {rng.choice(['lorem', 'zq', 'Kalev', 'xii'])}" * T


def plant(
    root: Path, steps: list[int], kind: str, count: int = 5000, seed: int = 0, **changes: Any
) -> Planted:
    """Train on `count` documents, of which one for each of `steps` is planted in that step.

    `root` becomes the working directory, with a store in it.
    """
    rng = random.Random(seed)
    os.chdir(root)
    current_store().create()
    texts = clean_texts(count - len(steps), rng)
    bad = [f"poison-{n}" for n in range(len(steps))]
    lines = [{"id": f"clean-{n}", "text": text} for n, text in enumerate(texts)]
    for number, name in enumerate(bad):
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
    place(root / "made/index", object.stat().st_size // (2 * T), bad, steps, root / "order.npy")
    model = {"max_sequence_length": T, "vocab_size": 512, "embedding_size": 512, "d_model": 32}
    settings = {
        "model": SETTINGS["model"] | model,
        "data": {"paths": [str(object)], "order_path": str(root / "order.npy")},
        "evaluators": [],
        "global_train_batch_size": G,
        "device_train_microbatch_size": G,
        "max_duration": max(steps),
        "save_interval_unsharded": 1000,
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
    }
    assert run(root, **{**settings, **changes}) == 0
    return Planted(root / "run", bad, steps)


def place(index: Path, instances: int, ids: list[str], steps: list[int], path: Path) -> None:
    """Write an order that has most of each document in its step, and what else there is of it in
    steps after all of these."""
    import polars

    table = polars.read_parquet(index)
    rng = np.random.default_rng(0)
    after, chosen, late = max(steps) * G, {}, []
    for name, step in zip(ids, steps, strict=True):
        start, end = table.filter(polars.col("id") == name).select("start", "end").row(0)
        parts = range(start // T, (end - 1) // T + 1)
        most = max(parts, key=lambda one: min(end, (one + 1) * T) - max(start, one * T))
        chosen[most] = step
        late += [one for one in parts if one != most]
    late = [one for one in late if one not in chosen]
    others = rng.permutation([n for n in range(instances) if n not in chosen and n not in late])
    left = list(others)
    found: list[int] = []
    by_step: dict[int, list[int]] = {}
    for one, step in chosen.items():
        by_step.setdefault(step, []).append(one)
    for step in range(1, max(steps) + 1):
        own = by_step.get(step, [])
        found += own + [int(left.pop()) for _ in range(G - len(own))]
    assert len(found) == after
    order.write_order(np.array(found + late + [int(one) for one in left]), path)


def config_of(planted: Planted) -> TrainConfig:
    return TrainConfig.load(planted.folder / "config.yaml", validate_paths=False)
