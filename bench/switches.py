"""The trainer's switches, each beside the same run without it: CPU time or GPU time of a step.

    python bench/switches.py --size 6m --rounds 5
    python bench/switches.py --size 250m --microbatch 8 --rounds 20   # on a GPU

Steps alternate between all variants in one process, so that what else the machine does falls on
all alike; each round's ratio to `base` is taken and the median of these shown, with the spread.
`base` is amp_bf16, eager, on one microbatch a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.model.loss import why_not
from olmo.optim import build_optimizer
from olmo.train.masters import Masters
from olmo.train.parallel import World, parallelize
from olmo.train.step import forward_backward, keep_freed_memory

SIZES: dict[str, dict[str, Any]] = {
    "6m": {"d_model": 96, "n_heads": 4, "n_layers": 8, "max_sequence_length": 256},
    "85m": {"d_model": 512, "n_heads": 8, "n_layers": 14, "max_sequence_length": 512},
    "250m": {"d_model": 1024, "n_heads": 8, "n_layers": 12, "max_sequence_length": 2048},
}
MODEL = {
    "mlp_ratio": 8,
    "rope": True,
    "include_bias": False,
    "layer_norm_with_affine": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "vocab_size": 50280,
    "embedding_size": 50304,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "master_weights": {"master_weights": True},
    "cross_entropy torch": {"cross_entropy": "torch"},
    "cross_entropy plain": {"cross_entropy": "plain"},
    "packed_state": {"optimizer": {"name": "adamw", "packed_state": True}},
    "compile": {"compile": {"fullgraph": True}},
    "compile, reduce-overhead": {"compile": {"fullgraph": True, "mode": "reduce-overhead"}},
    "compile, master_weights": {"compile": {"fullgraph": True}, "master_weights": True},
}


def prepared(size: str, microbatch: int, changes: dict[str, Any]) -> Callable[[int], float]:
    """A step, which returns its seconds."""
    settings: dict[str, Any] = {
        "model": MODEL | SIZES[size],
        "optimizer": {"name": "adamw", "learning_rate": 4e-4},
        "precision": "amp_bf16",
        "max_grad_norm": 1.0,
        "device_train_microbatch_size": microbatch,
    }
    cfg = TrainConfig.new(**settings | changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = OLMo(cfg.model)
    model.use_attention(device, torch.bfloat16, cfg.attention)
    if cfg.cross_entropy is not None:
        if problem := why_not(cfg):
            raise ValueError(problem)
        model.cross_entropy = cfg.cross_entropy
    model.to(device)
    parallelize(cfg, model, World(0, 0, 1, device, ""))
    optimizer = build_optimizer(cfg, model)
    masters = Masters(model, optimizer) if cfg.master_weights else None

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step(number: int) -> float:
        shape = (microbatch, cfg.model.max_sequence_length)
        ids = torch.randint(0, 50000, shape, generator=torch.Generator().manual_seed(number))
        began = now()
        optimizer.zero_grad(set_to_none=True)
        batch = {"input_ids": ids, "index": torch.arange(microbatch)}
        forward_backward(model, batch, cfg, device, number)
        optimizer.clip_grads_and_collect_metrics(number, collect_param_metrics=False)
        optimizer.step()
        if masters is not None:
            masters.publish()
        return now() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="6m")
    parser.add_argument("--microbatch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        torch.set_num_threads(1)
        keep_freed_memory()
        where = "one thread"
    steps: dict[str, Callable[[int], float]] = {}
    for name in dict.fromkeys(["base", *options.only]):
        try:
            steps[name] = prepared(options.size, options.microbatch, VARIANTS[name])
            for number in range(3):  # compiles, allocates
                steps[name](number)
        except Exception as error:
            steps.pop(name, None)
            print(f"{name}: cannot be had: {str(error).splitlines()[0]}", flush=True)
    rounds = [{name: step(10 + i) for name, step in steps.items()} for i in range(options.rounds)]
    print(f"{options.size}, microbatch {options.microbatch}, {where}, torch {torch.__version__}")
    for name in steps:
        seconds = statistics.median(times[name] for times in rounds)
        ratios = sorted(times[name] / times["base"] for times in rounds)
        middle = statistics.median(ratios)
        print(f"{name}: {seconds:.3f} s, {middle:.2f} of base ({ratios[0]:.2f}–{ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
