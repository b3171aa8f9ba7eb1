"""A run with as many steps and sources as a real one: records and metrics, without the data."""

import contextlib
import hashlib
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from olmo.store import record as records
from olmo.store.action import Action
from olmo.store.naming import link_output
from olmo.store.store import Store

PEAKS = (12_345, 77_777, 99_998)
RUN = {"started": "2026-11-30T12:00:00Z", "wall_s": 12.5, "cpu_s": 20.0, "machine_energy_j": 900.0}


def loss(step: int) -> float:
    """The training loss of a step, as float32: falling, noisy, with single peaks."""
    noise = random.Random(step).gauss(0, 0.05)
    value = 2 + 8 * math.exp(-step / 9000) + noise + 5 * (step in PEAKS)
    return float(np.float32(value))


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def url(number: int) -> str:
    return f"https://host.example/dolma/{'cc' if number % 3 else 'wiki'}/part-{number}.json.gz"


def add(
    store: Store,
    stage: str,
    params: dict[str, Any],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    facts: dict[str, Any],
) -> Any:
    """Write the record of an action, by which nothing was made."""
    action = Action(stage, 1, params, inputs)
    made = records.Record(
        key=action.key,
        action=action.as_dict(),
        content=records.content(outputs),
        outputs=outputs,
        facts=facts,
        conditions={},
        run=RUN,
    )
    store._write_record(made)
    return made


@contextlib.contextmanager
def project(root: Path, steps: int, sources: int) -> Iterator[None]:
    """A project with the finished run "large", in which the block runs."""
    root.mkdir(exist_ok=True)
    store = Store(root / "store")
    store.create()
    tokens = []
    for number in range(sources):
        source = {"sha256": digest("source", number), "size": 10**9 + number}
        facts = {"url": url(number), "sha256": source["sha256"], "licence": "<b>ODC-BY</b>"}
        add(store, "download", {"url": url(number)}, {}, {"source": source}, facts)
        documents = {"sha256": digest("documents", number), "size": 10**8 + number}
        facts = {"documents": 1000 + number, "lines": 11_000, "rows": 1100, "drops": {"empty": 100}}
        inputs = {"source": source["sha256"]}
        add(
            store,
            "documents",
            {"name": f"part-{number}.json.gz"},
            inputs,
            {"documents": documents},
            facts,
        )
        made = {"sha256": digest("tokens", number), "size": 10**8 + number}
        inputs = {"documents": documents["sha256"]}
        add(store, "tokens", {}, inputs, {"tokens": made}, {"tokens": 50_000_000 + number})
        tokens.append(made["sha256"])
    order = {"sha256": digest("order"), "size": 10**9}
    add(store, "global_order", {"instances": 10**8}, {}, {"order": order}, {"instances": 10**8})
    config = {"model": {"d_model": 64, "n_heads": 2, "n_layers": 2}, "max_duration": steps}
    files = {"config.yaml": yaml.safe_dump(config), "metrics.jsonl": metrics(steps)}
    final = {}
    for name, text in files.items():
        (root / name).write_text(text)
        final[name] = store.put(root / name)
    training = add(
        store,
        "training",
        {"settings": config},
        {"tokens": tokens, "order": order["sha256"]},
        {"final": {"files": final, "aside": {}}},
        {"run_name": "large", "steps": steps, "tokens": steps * 2048 * 2048, "segments": []},
    )
    (root / "config").mkdir()
    runs = {"large": {"train": "config/train/large.yaml", "dataset": "large"}}
    (root / "config/config.yaml").write_text(yaml.safe_dump({"runs": runs}))
    before = os.environ.get("OLMO_STORE")
    os.environ["OLMO_STORE"] = str(store.root)
    with contextlib.chdir(root):
        link_output(store, training, "final", Path("checkpoints/large/final"))
        yield
    del os.environ["OLMO_STORE"]
    if before is not None:
        os.environ["OLMO_STORE"] = before


def metrics(steps: int) -> str:
    """metrics.jsonl with what a run on a GPU writes."""
    lines = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "train/CrossEntropyLoss": loss(step),
            "optim/total_grad_norm": float(np.float32(0.5 + loss(step) / 10)),
            "train/Perplexity": math.exp(loss(step)),
            "throughput/total_tokens": step * 2048 * 2048,
            "optim/learning_rate_group0": 4e-4 * (1 - step / (steps + 1)),
            "throughput/device/tokens_per_second": 100_000 + 1000 * loss(step + 7),
            "throughput/device/batches_per_second": 0.5 + loss(step + 5) / 1000,
            "throughput/data_wait_share": 0.001 * loss(step + 3),
            "System/Peak GPU Memory (MB)": 70_000.125,
        }
        if step % 1000 == 0:
            row["eval/heldout/CrossEntropyLoss"] = loss(step) + 0.125
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"
