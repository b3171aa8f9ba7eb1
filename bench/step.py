"""A training step of ours beside OLMo's own trainer, on the CPU.

    python bench/step.py --peer /some/where/bin/python [--size 6m|6m-8k|85m] [--rounds 7]

The peer is an environment with PyPI's `ai2-olmo` (tests/parity/README.md makes one). Both packages
are called `olmo`, so each side runs in a process of its own and waits for its turn: A B A B. CPU
seconds of the process are compared, since wall time on a shared machine is another's business;
quoted are the medians, and the median over rounds of the pairwise ratio.

A step is forward, loss, backward, clipping, learning rate, update, as each side's trainer does it,
on the same ids from the same weights. Peak memory is the highest resident size within a step over
that before it, with weights and optimizer state in place.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

# OLMo's vocabulary makes the head most of a small model; with a small one the blocks are.
SIZES = {
    "6m": {"d_model": 96, "n_heads": 4, "n_layers": 8, "vocab_size": 50304, "batch": 2, "T": 256},
    "6m-8k": {
        "d_model": 256,
        "n_heads": 4,
        "n_layers": 4,
        "vocab_size": 8192,
        "batch": 4,
        "T": 256,
    },
    "85m": {
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 14,
        "vocab_size": 50304,
        "batch": 1,
        "T": 512,
    },
}
SIDES = ("ours compiled", "ours eager", "peer eager", "peer compiled")


def config_of(size: dict[str, int]) -> dict[str, Any]:
    return {
        "model": {
            "d_model": size["d_model"],
            "n_heads": size["n_heads"],
            "n_layers": size["n_layers"],
            "mlp_ratio": 8,
            "rope": True,
            "include_bias": False,
            "layer_norm_with_affine": False,
            "attention_layer_norm_with_affine": False,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "vocab_size": size["vocab_size"],
            "embedding_size": size["vocab_size"],
            "max_sequence_length": size["T"],
            "weight_tying": True,
            "init_fn": "mitchell",
            "init_device": "cpu",
        },
        "optimizer": {"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.1},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": 100},
        "max_grad_norm": 1.0,
        "max_duration": 1000,
    }


def build_step(side: str, size: dict[str, int]) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    import torch
    import torch.nn.functional as F

    from olmo.config import TrainConfig
    from olmo.model import OLMo
    from olmo.optim import build_optimizer, build_scheduler

    torch.manual_seed(6198)
    cfg = TrainConfig.new(**config_of(size))
    model = OLMo(cfg.model)
    optim, scheduler = build_optimizer(cfg, model), build_scheduler(cfg)
    ids = torch.randint(0, size["vocab_size"], (size["batch"], size["T"]))
    whose, how = side.split()

    def peer_loss() -> Any:
        logits = model(input_ids=ids).logits[..., :-1, :].contiguous()
        rows = logits.view(-1, logits.size(-1))
        labels = ids[..., 1:].contiguous().view(-1)
        return F.cross_entropy(rows, labels, ignore_index=-100, reduction="sum") / ids.numel()

    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)

    def our_loss() -> Any:
        return model(ids, labels=labels).loss.total / ids.numel()

    if whose == "ours":
        from olmo.train.step import keep_freed_memory

        keep_freed_memory()
        model.use_attention()
        if how == "compiled":
            model.compile(fullgraph=True)  # no graph breaks, or an error
    elif how == "compiled":
        for block in model.transformer.blocks:
            block.compile()
    loss_of = our_loss if whose == "ours" else peer_loss
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        optim.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        metrics = optim.clip_grads_and_collect_metrics(number, collect_param_metrics=False)
        for group in optim.param_groups:
            group["lr"] = scheduler.get_lr(cfg.optimizer.learning_rate, number, 1000)
        optim.step()
        if whose == "peer":
            for value in metrics.values():
                value.item()
        return loss.item()

    return step


def serve(side: str, size: dict[str, int]) -> None:
    """Train as many steps as each line on stdin says, and answer with what they took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = build_step(side, size)
    for line in sys.stdin:
        steps = int(line)
        ctypes.CDLL(None).malloc_trim(0)
        base = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")  # forget the highest so far
        cpu, wall = time.process_time(), time.monotonic()
        loss = [step() for _ in range(steps)]
        answer = {
            "cpu": (time.process_time() - cpu) / steps,
            "wall": (time.monotonic() - wall) / steps,
            "memory": (resident("VmHWM") - base) / 1024,
            "loss": loss[-1],
        }
        print(json.dumps(answer), file=answers, flush=True)


def resident(field: str) -> int:
    """KiB"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=os.environ.get("OLMO_PEER_PYTHON"))
    parser.add_argument("--size", choices=SIZES, default="6m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.serve:
        import torch

        torch.set_num_threads(args.threads)
        serve(args.serve, size)
        return
    sides = [side for side in SIDES if args.peer or side.startswith("ours")]
    if not args.peer:
        print("the peer is left out: --peer names no Python; see tests/parity/README.md")

    processes = {}
    for side in sides:
        python = sys.executable if side.startswith("ours") else args.peer
        command = [python, os.path.abspath(__file__), "--serve", side, "--size", args.size]
        processes[side] = subprocess.Popen(
            [*command, "--threads", str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )

    def ask(side: str, steps: int) -> dict[str, float]:
        process = processes[side]
        assert process.stdin is not None and process.stdout is not None
        print(steps, file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{side} ended with exit code {process.wait()}")
        return json.loads(line)

    try:
        for side in sides:
            first = ask(side, 3)
            print(f"{side}: loss {first['loss']:.6f} after 3 steps", flush=True)
        rounds = []
        for _ in range(args.rounds):
            rounds.append({side: ask(side, args.steps) for side in sides})
            times = ", ".join(f"{side} {rounds[-1][side]['cpu']:.3f}" for side in sides)
            print(f"CPU s a step: {times}", flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()

    def median(side: str, what: str) -> float:
        return statistics.median(r[side][what] for r in rounds)

    import torch

    print(
        f"\n{date.today()}, {platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    )
    print(f"{args.size}: {size['batch']} x {size['T']} tokens a step, {args.rounds} rounds\n")
    print("| side | CPU s/step | wall s/step | peak MiB over base |\n|---|---|---|---|")
    for side in sides:
        cells = [median(side, "cpu"), median(side, "wall"), median(side, "memory")]
        print(f"| {side} | {cells[0]:.3f} | {cells[1]:.3f} | {cells[2]:.0f} |")
    if args.peer:
        best = min(("peer eager", "peer compiled"), key=lambda side: median(side, "cpu"))
        for side in ("ours compiled", "ours eager"):
            ratio = statistics.median(r[best]["cpu"] / r[side]["cpu"] for r in rounds)
            least = min(median(s, "memory") for s in ("peer eager", "peer compiled"))
            memory = median(side, "memory") / least
            print(f"\n{side}: {ratio:.2f} times as fast as {best}, {memory:.2f} of its memory")


if __name__ == "__main__":
    main()
