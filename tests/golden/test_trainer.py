"""The trainer itself, from token files to metrics, goes as OLMo's does for fifty steps."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filling import fill

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_run import metrics, run

from olmo.config import TrainConfig
from olmo.model import OLMo

HERE = Path(__file__).parent / "curves"
GOLDEN = json.loads((HERE / "curves.json").read_text())


@pytest.mark.parametrize("name", GOLDEN["variants"])
def test_fifty_steps(tmp_path: Path, name: str) -> None:
    expected = GOLDEN["variants"][name]
    plain: dict[str, Any] = dict(GOLDEN["config"])
    for key, value in expected["overrides"].items():
        plain[key] = plain[key] | value if isinstance(value, dict) else value
    start = tmp_path / "start-unsharded"
    start.mkdir()
    model = OLMo(TrainConfig.new(**plain).model)
    fill(model)
    torch.save(model.state_dict(), start / "model.pt")
    plain |= {
        "save_folder": str(tmp_path / "run"),
        "data": plain["data"] | {"paths": [str(HERE / "train_a.npy"), str(HERE / "train_b.npy")]},
        "load_path": str(start),
        "reset_optimizer_state": True,
        "reset_trainer_state": True,
        "evaluators": [],
    }
    assert run(tmp_path, **plain) == 0
    lines = metrics(tmp_path / "run")
    losses = [m["train/CrossEntropyLoss"] for m in lines]
    np.testing.assert_allclose(losses, expected["loss"], rtol=1e-5)
    norms = [m["optim/total_grad_norm"] for m in lines]
    np.testing.assert_allclose(norms, expected["gn"], rtol=1e-5)
    rates = [m["optim/learning_rate_group0"] for m in lines]
    np.testing.assert_allclose(rates, expected["lr"], rtol=1e-12)
    indices = (tmp_path / "run/data-indices/rank0.tsv.gz").read_bytes()
    rows = gzip.decompress(indices).decode().splitlines()
    found = [[int(i) for i in row.split("\t")[1:]] for row in rows]
    assert found[: len(expected["idx"])] == expected["idx"]
