"""Items, batches, the order and each process's and worker's share of it, on random files."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_data import run

import olmo.config
import olmo.data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("OLMO_PEER_PYTHON"),
        reason="OLMO_PEER_PYTHON is not set; see tests/parity/README.md",
    ),
]


def random_share(r: random.Random, n: int) -> dict[str, Any]:
    world_size = r.choice([1, 2, 3, 4])
    batch = world_size * r.choice([1, 2, 3])
    return {
        "world_size": world_size,
        "global_batch_size": batch,
        "seed": r.choice([0, 6198, r.randrange(2**31)]),
        "epoch": r.choice([0, 0, 3]),
        "start_index": batch * r.choice([0, 0, 1, 4]),
        "max_examples": r.choice([None, None, batch * 6]),
        "shuffle": r.random() < 0.8,
        "drop_last": r.random() < 0.5 and n > world_size,
        "workers": r.choice([1, 2, 3]),
    }


def random_case(seed: int) -> dict[str, Any]:
    r = random.Random(seed)
    chunk = r.choice([4, 7, 16])
    lengths = [r.choice([chunk - 1, r.randint(chunk, 12 * chunk)]) for _ in range(r.randint(1, 4))]
    lengths.append(5 * chunk + r.randrange(chunk))  # at least one that is long enough
    n = sum(length // chunk for length in lengths)
    return {
        "seed": seed,
        "dtype": r.choice(["uint16", "uint32", "uint8", "uint64"]),
        "chunk": chunk,
        "lengths": lengths,
        "label_masks": r.random() < 0.5,
        "attention_mask": r.random() < 0.5,
        "doc_lengths": r.random() < 0.5,
        "filter": {
            "repetition_max_period": r.choice([1, 3, 13]),
            "repetition_min_period": 1,
            "repetition_max_count": r.choice([1, 3, 4]),
        },
        "pad_direction": r.choice(["left", "right"]),
        "shares": [random_share(r, n) for _ in range(4)],
    }


CASES = [random_case(seed) for seed in range(int(os.environ.get("OLMO_PARITY_CASES", 12)))]


def test_the_same_items_and_shares(theirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = theirs("peer_data.py", CASES)
    found: dict[str, np.ndarray] = {}
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: None)
    for i, case in enumerate(CASES):
        ours = run(case, tmp_path, olmo.config, olmo.data)
        found |= {f"{i}/{key}": value for key, value in ours.items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(
            found[key], value, err_msg=f"{key} of {CASES[int(key.split('/')[0])]}"
        )
        if "item" in key or "batch" in key:
            assert found[key].dtype == value.dtype, key
