"""How much of the gradients' all-reduce happens while backward computes, on two processes.

    python bench/overlap.py [--steps 8]

Each process trains a model of 29M parameters (118 MB of gradients, four buckets) by the
trainer's own step, over gloo on loopback, one thread each. torch's profiler says when the buckets
were on their way and when backward ran; beside it, steps that send nothing before backward is
done, in turns with those that do (A B A B): process-CPU and wall seconds, medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import time
from datetime import date
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile, record_function

from olmo.config import TrainConfig
from olmo.distributed.reduce import GradientReducer, assign_buckets
from olmo.distributed.world import join_world, leave_world
from olmo.model import OLMo
from olmo.train.step import forward_backward

CONFIG: dict[str, Any] = {
    "model": {
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 5,
        "mlp_ratio": 8,
        "rope": True,
        "include_bias": False,
        "layer_norm_with_affine": False,
        "attention_layer_norm_with_affine": False,
        "vocab_size": 8192,
        "embedding_size": 8192,
        "max_sequence_length": 128,
        "weight_tying": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    "device_train_microbatch_size": 1,
}
Span = tuple[float, float]


def union(spans: list[Span]) -> list[Span]:
    """Spans of time that do not touch, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def common(a: list[Span], b: list[Span]) -> float:
    """How long two unions of spans hold at once."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def rank(number: int, port: int, steps: int, found: Any) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cfg = TrainConfig.new(**CONFIG)
    world = join_world()
    torch.manual_seed(0)
    model = OLMo(cfg.model)
    parameters = list(model.parameters())
    reducer = GradientReducer(parameters, world)
    ids = torch.randint(2, cfg.model.vocab_size, (1, cfg.model.max_sequence_length))
    batch = {"input_ids": ids, "index": torch.arange(1)}

    def step(overlapped: bool) -> None:
        model.zero_grad(set_to_none=True)
        with record_function("forward and backward"):
            forward_backward(model, batch, cfg, world.device, 1, reducer if overlapped else None)
        reducer.finish()

    step(True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 * steps):
        world.barrier()
        begun = time.perf_counter()
        step(i % 2 == 0)
        seconds[i % 2 == 0].append(time.perf_counter() - begun)
    world.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step(True)
    events = [(e.name, (e.time_range.start, e.time_range.end)) for e in profiler.events() or ()]
    sums = union([span for name, span in events if "all_reduce" in name and "gloo" in name])
    backward = union([span for name, span in events if "evaluate_function" in name])
    if number == 0:
        found.put(
            {
                "parameters": sum(p.numel() for p in parameters),
                "buckets": len(assign_buckets(parameters)),
                "sums_s": length(sums) / 1e6 / steps,
                "overlapped": common(sums, backward) / length(sums),
                "with_s": statistics.median(seconds[True]),
                "without_s": statistics.median(seconds[False]),
            }
        )
    world.barrier()
    leave_world(world)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="of each kind")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    found = context.SimpleQueue()
    mp.start_processes(rank, args=(port, options.steps, found), nprocs=2, start_method="spawn")
    seen = found.get()
    load = os.getloadavg()[0]
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"load {load:.1f}; {seen['parameters'] / 1e6:.0f}M parameters, {seen['buckets']} buckets"
    )
    print(f"all-reduce under way: {seen['sums_s']:.2f} s a step")
    print(f"of that while backward computes: {seen['overlapped']:.0%}")
    print(f"a step: {seen['with_s']:.2f} s; all sent after backward: {seen['without_s']:.2f} s")


if __name__ == "__main__":
    main()
