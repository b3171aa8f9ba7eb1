"""Runs in the peer's environment: its data set, collator, order and batches on random files.

python peer_data.py CASES.json RESULTS.npz
"""

import json
import sys
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch


class Worker(NamedTuple):
    id: int
    num_workers: int


def write_files(case: dict[str, Any], folder: Any) -> dict[str, list[str]]:
    """Token files and label masks whose contents depend on the case's seed alone."""
    r = np.random.default_rng(case["seed"])
    names: dict[str, list[str]] = {"paths": [], "masks": []}
    for i, length in enumerate(case["lengths"]):
        tokens = r.integers(0, 12, length).astype(case["dtype"])
        if i % 2:
            tokens[: length // 2] = np.resize(r.integers(2, 9, 3), length // 2)  # repeats itself
        for kind, content in (("paths", tokens), ("masks", r.random(length) < 0.7)):
            path = f"{folder}/{case['seed']}-{i}-{kind}"
            content.tofile(path)
            names[kind].append(path)
    return names


def run(case: dict[str, Any], folder: Any, config: Any, data: Any) -> dict[str, np.ndarray]:
    """The same code for both sides, given their `olmo.config` and `olmo.data`."""
    files = write_files(case, folder)
    dataset = data.MemMapDataset(
        *files["paths"],
        chunk_size=case["chunk"],
        memmap_dtype=getattr(np, case["dtype"]),
        metadata=[{"path": i} for i in range(len(files["paths"]))],
        generate_attention_mask=case["attention_mask"],
        generate_doc_lengths=case["doc_lengths"],
        pad_token_id=1,
        eos_token_id=0,
        label_mask_paths=files["masks"] if case["label_masks"] else None,
        instance_filter_config=config.InstanceFilterConfig(**case["filter"]),
    )
    out: dict[str, Any] = {"length": len(dataset)}
    for i in range(len(dataset)):
        for key, value in dataset[i].items():
            out[f"item/{i}/{key}"] = value["path"] if key == "metadata" else value
    direction = config.PaddingDirection(case["pad_direction"])
    collator = data.DataCollator(pad_direction=direction, pad_token_id=1)
    for key, value in collator([dataset[i] for i in range(len(dataset))]).items():
        if key != "metadata":
            out[f"batch/{key}"] = value

    for shares in case["shares"]:
        for rank in range(shares["world_size"]):
            share = data.IterableDataset(dataset, shuffle=shares["shuffle"], rank=rank, **{
                k: shares[k] for k in ("global_batch_size", "world_size", "seed", "epoch",
                                       "start_index", "max_examples", "drop_last")
            })  # fmt: skip
            name = f"share/{case['shares'].index(shares)}/{rank}"
            out[f"{name}/all"] = share.get_global_indices()
            for w in range(shares["workers"]):
                torch.utils.data.get_worker_info = partial(Worker, w, shares["workers"])
                out[f"{name}/worker{w}"] = [item["index"] for item in share]
            torch.utils.data.get_worker_info = lambda: None
            out[name] = [item["index"] for item in share]
            share.reshuffle(epoch=shares["epoch"] + 1)
            out[f"{name}/next"] = [item["index"] for item in share]
    return {k: np.asarray(v) for k, v in out.items()}


if __name__ == "__main__":
    import olmo.config
    import olmo.data

    with open(sys.argv[1]) as file:
        cases = json.load(file)
    found = [run(case, ".", olmo.config, olmo.data) for case in cases]
    np.savez(sys.argv[2], **{f"{i}/{k}": v for i, out in enumerate(found) for k, v in out.items()})
