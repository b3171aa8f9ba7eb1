"""How much of the gradients' all-reduce overlaps with backward, on two processes.

    python bench/overlap.py [--steps 8]

Each process trains a model of 29M parameters (118 MB of gradients, four buckets) by the trainer's
own step, over gloo on loopback, with one thread. torch's profiler gives the times of the all-reduce
and of backward. Steps that send nothing before backward ends alternate with those that do; the
result has the median wall seconds of both.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from olmo.bench.script import describe_run, measure_interleaved, medians, parse_options
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
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0),
    },
    "device_train_microbatch_size": 1,
}
Span = tuple[float, float]


def union(spans: list[Span]) -> list[Span]:
    """The spans merged where they overlap, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def total(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def shared(a: list[Span], b: list[Span]) -> float:
    """How long two unions of spans overlap."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def run_rank(number: int, port: int, steps: int, results: Any) -> None:
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
        forward_backward(model, batch, cfg, world.device, 1, reducer if overlapped else None)
        reducer.finish()

    def time_step(overlapped: bool) -> float:
        world.barrier()
        began = time.perf_counter()
        step(overlapped)
        return time.perf_counter() - began

    step(True)
    programs = {"with_s": lambda: time_step(True), "without_s": lambda: time_step(False)}
    seconds = medians(measure_interleaved(steps, programs))
    world.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step(True)
    events = [(e.name, (e.time_range.start, e.time_range.end)) for e in profiler.events() or ()]
    sums = union([span for name, span in events if "all_reduce" in name and "gloo" in name])
    backward = union([span for name, span in events if "evaluate_function" in name])
    if number == 0:
        results.put(
            {
                "parameters": sum(p.numel() for p in parameters),
                "buckets": len(assign_buckets(parameters)),
                "sums_s": total(sums) / 1e6 / steps,
                "overlapped": shared(sums, backward) / total(sums),
                **seconds,
            }
        )
    world.barrier()
    leave_world(world)


def main() -> None:
    steps = parse_options(__doc__, steps={"default": 8, "help": "of each kind"}).steps
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(run_rank, args=(port, steps, results), nprocs=2, start_method="spawn")
    found = results.get()
    model = f"{found['parameters'] / 1e6:.0f}M parameters, {found['buckets']} buckets"
    print(describe_run(f"torch {torch.__version__}", model))
    print(f"all-reduce: {found['sums_s']:.2f} s a step")
    print(f"of that while backward computes: {found['overlapped']:.0%}")
    print(f"a step: {found['with_s']:.2f} s; all sent after backward: {found['without_s']:.2f} s")


if __name__ == "__main__":
    main()
