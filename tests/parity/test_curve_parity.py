"""Fifty steps of random runs: losses, gradient norms, how much is clipped, learning rates."""

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from peer_curves import run

import olmo.optim
from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.train.step import forward_backward

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("OLMO_PEER_PYTHON"),
        reason="OLMO_PEER_PYTHON is not set; see tests/parity/README.md",
    ),
]
CLIPPING: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 0.2},
    {"max_grad_norm_ratio": 1.05},
    {"max_grad_norm_ratio": 0.9, "max_grad_norm": 1.0},
]


def random_case(seed: int) -> dict[str, Any]:
    r = random.Random(seed)
    name = ["adamw", "lionw"][seed % 2]
    warm_clipping = r.random() < 0.5
    config = CLIPPING[seed // 2 % len(CLIPPING)] | {
        "model": {
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "mlp_ratio": 4,
            "rope": True,
            "layer_norm_type": r.choice(["default", "rms"]),
            "layer_norm_with_affine": r.random() < 0.5,
            "attention_layer_norm": r.random() < 0.5,
            "weight_tying": r.random() < 0.5,
            "include_bias": False,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "max_sequence_length": 16,
            "vocab_size": 100,
            "embedding_size": 128,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "init_device": "cpu",
        },
        "optimizer": {
            "name": name,
            "learning_rate": 3e-3 if name == "adamw" else 3e-4,
            "weight_decay": r.choice([0.0, 0.1]),
            "betas": r.choice([[0.9, 0.95], [0.9, 0.99], [0.95, 0.98]]),
            "eps": r.choice([1e-5, 1e-8]),
            "selective_updates": r.random() < 0.3,
            "decay_norm_and_bias": r.random() < 0.5,
            "decay_embeddings": r.random() < 0.5,
        },
        "scheduler": {
            "name": r.choice(["cosine_with_warmup", "linear_with_warmup", "constant"]),
            "t_warmup": r.choice([2, 10]),
            "alpha_f": 0.1,
            "grad_clip_warmup_steps": 10 if warm_clipping else None,
            "grad_clip_warmup_factor": 5.0 if warm_clipping else None,
        },
        "global_train_batch_size": 4,
        "device_train_microbatch_size": r.choice([1, 2, 4]),
        "softmax_auxiliary_loss": r.random() < 0.5,
        "precision": "fp32",
    }
    masks = r.choice([[], ["label"], ["attention"], ["label", "attention", "instance"]])
    return {"seed": seed, "config": config, "masks": masks, "steps": 50}


CASES = [random_case(seed) for seed in range(int(os.environ.get("OLMO_PARITY_CASES", 10)))]


def backward(model: OLMo, batch: dict[str, Any], cfg: TrainConfig, step: int) -> tuple[Any, Any]:
    losses = forward_backward(model, batch, cfg, torch.device("cpu"), step)
    return losses.ce, 0.0 if losses.z is None else losses.z


def test_the_same_curves(theirs) -> None:
    expected = theirs("peer_curves.py", CASES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, case in enumerate(CASES):
            found = run(case, TrainConfig.new, OLMo, olmo.optim, backward)
            # LionW moves by the sign of what may be about 0, which shows in the norms first.
            norms = 1e-4 if case["config"]["optimizer"]["name"] == "adamw" else 2e-3
            limits = {"ce": 1e-4, "z": 1e-4, "norm": norms, "clipped": 5e-2, "lr": 1e-12}
            for column, limit in limits.items():
                ours, other = (x[column] for x in (found, {k: expected[f"{i}/{k}"] for k in found}))
                off = 1.0 if column == "clipped" else np.abs(other)
                assert (np.abs(ours - other) <= limit * off).all(), f"{column} of {case}"
            for key in found.keys() - limits.keys():
                near = pytest.approx(float(expected[f"{i}/{key}"]), rel=1e-3)
                assert float(found[key]) == near, f"{key} of {case}"
    finally:
        torch.set_num_threads(threads)
