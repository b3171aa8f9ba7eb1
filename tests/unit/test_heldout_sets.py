"""Perplexity of held-out files while a run trains, by label and by part."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import LENGTH, config

from olmo.distributed.world import World
from olmo.eval.evaluators import build_evaluators, run_evaluators
from olmo.model import OLMo

ALONE = World(0, 0, 1, torch.device("cpu"), "")


def test_held_out_sets_by_label(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    ids = np.fromfile(tmp_path / "heldout.npy", np.uint16)
    for name, part in (("a", ids[: 3 * LENGTH]), ("b", ids[3 * LENGTH :])):
        part.tofile(tmp_path / f"{name}.npy")
    sets = {name: [str(tmp_path / f"{name}.npy")] for name in "ab"}
    sizes = {"device_eval_batch_size": 2}
    cfg = config(
        tmp_path,
        evaluators=[
            {"label": "both", "data": {"datasets": sets}, **sizes},
            *({"label": f"{n}-alone", "data": {"paths": sets[n]}, **sizes} for n in "ab"),
            {"label": "part", "data": {"datasets": sets}, "subset_num_batches": 2, **sizes},
        ],
    )
    model = OLMo(cfg.model.update_with(init_device="cpu"))
    evaluators = build_evaluators(cfg, ALONE)
    found = run_evaluators(evaluators[:3], model)
    assert model.training
    for n in "ab":
        loss = found[f"eval/{n}/CrossEntropyLoss"]
        assert loss == pytest.approx(found[f"eval/{n}-alone/CrossEntropyLoss"], rel=1e-6)
        assert found[f"eval/{n}/Perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert "eval/both/CrossEntropyLoss" not in found
    part = run_evaluators(evaluators[3:], model)
    assert part["eval/a/CrossEntropyLoss"] == pytest.approx(found["eval/a/CrossEntropyLoss"])
    assert part["eval/b/CrossEntropyLoss"] != pytest.approx(found["eval/b/CrossEntropyLoss"])
