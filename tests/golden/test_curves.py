"""Fifty steps of training go as OLMo's do: losses, gradient norms, learning rates, weights."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filling import fill

from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.optim import build_optimizer, build_scheduler

HERE = Path(__file__).parent / "curves"
GOLDEN = json.loads((HERE / "curves.json").read_text())
VARIANTS = GOLDEN["variants"]
# The batches do not depend on the variant, and are there in full for one.
BATCHES = VARIANTS["adamw_seed"]["idx"]


def instances() -> torch.Tensor:
    """(instances, 32)"""
    files = [np.fromfile(HERE / f, dtype="<u2") for f in ("train_a.npy", "train_b.npy")]
    chunks = [f[: len(f) // 32 * 32].reshape(-1, 32) for f in files]
    return torch.from_numpy(np.concatenate(chunks).astype(np.int64))


def config_of(variant: dict[str, Any]) -> TrainConfig:
    plain = copy.deepcopy(GOLDEN["config"])
    del plain["distributed_strategy"]  # "single", where we say null
    for key, value in variant["overrides"].items():
        plain[key] = plain[key] | value if isinstance(value, dict) else value
    return TrainConfig.new(**plain)


@pytest.mark.parametrize("name", VARIANTS)
def test_curve(name: str) -> None:
    variant, data = VARIANTS[name], instances()
    cfg = config_of(variant)
    model = OLMo(cfg.model)
    fill(model)
    optim, scheduler = build_optimizer(cfg, model), build_scheduler(cfg)
    found: dict[str, list[float]] = {"loss": [], "gn": [], "lr": []}
    for step, batch in enumerate(BATCHES, start=1):
        optim.zero_grad()
        total = 0.0
        for ids in data[batch].split(cfg.device_train_microbatch_size):
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
            loss = loss / data[batch].numel()
            loss.backward()
            total += loss.item()
        metrics = optim.clip_grads_and_collect_metrics(step, collect_param_metrics=step % 7 == 0)
        lr = scheduler.get_lr(cfg.optimizer.learning_rate, step, 50)
        for group in optim.param_groups:
            group["lr"] = lr
        optim.step()
        for key, value in zip(found, (total, metrics["total_grad_norm"].item(), lr), strict=True):
            found[key].append(value)
    np.testing.assert_allclose(found["loss"], variant["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["gn"], variant["gn"], rtol=1e-5)
    np.testing.assert_allclose(found["lr"], variant["lr"], rtol=1e-12)
    for n, p in model.named_parameters():
        expected = variant["final_param_sums"][n]
        assert p.detach().double().sum().item() == pytest.approx(expected, abs=1e-4), n


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_groups(name: str) -> None:
    cfg = config_of(VARIANTS[name])
    groups = build_optimizer(cfg, OLMo(cfg.model)).param_groups
    found = [{"weight_decay": g["weight_decay"], "names": g["param_names"]} for g in groups]
    expected = [
        g | {"names": [n.removeprefix("module.") for n in g["names"]]}
        for g in VARIANTS[name]["groups"]
    ]
    assert found == expected
