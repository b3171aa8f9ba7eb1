"""Profiles a cell's step on a GPU: time by family of kernels, and the twenty longest kernels.

On a CPU: of torch's operations. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from olmo.bench.cell import build_workload
from olmo.bench.matrix import Cell, Section
from olmo.bench.timing import synchronize

STEPS, WARMUP, LONGEST = 3, 4, 20
# A kernel belongs to the first family that has a part of its name.
FAMILIES = {
    "attention": ("cudnn_generated", "flash", "fmha", "sdpa", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "_mm"),
    "optimizer": ("multi_tensor_apply", "fused_adam"),
    "loss": ("prepare_softmax", "logsumexp", "softmax"),
    "compiled elementwise": ("triton_",),
    "copies": ("Memcpy", "Memset", "copy"),
    "elementwise": ("elementwise", "reduce_kernel", "layer_norm"),
}


def family(name: str) -> str:
    return next((f for f, words in FAMILIES.items() if any(w in name for w in words)), "other")


def main() -> None:
    request = json.loads(sys.argv[1])
    workload = build_workload(Section.new(**request["section"]), Cell(**request["cell"]))
    device = workload.device
    on_gpu = device.type == "cuda"
    batches = [workload.ids(number) for number in range(WARMUP + STEPS)]
    for number in range(WARMUP):
        workload.step(number, batches[number])
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for number in range(WARMUP, WARMUP + STEPS):
            workload.step(number, batches[number])
        synchronize(device)
    totals: dict[str, tuple[float, int]] = {}  # ms and calls of a step
    for event in profiler.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        is_kernel = not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
        if time and is_kernel:
            totals[event.key] = (time / 1e3 / STEPS, event.count // STEPS)
    families: dict[str, dict[str, float]] = {}
    for name, (ms, calls) in totals.items():
        total = families.setdefault(family(name), {"ms": 0.0, "calls": 0})
        total["ms"] += ms
        total["calls"] += calls
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:LONGEST]
    record: dict[str, Any] = {
        "cell": request["cell"],
        "steps": STEPS,
        "ms": sum(ms for ms, _ in totals.values()),
        "families": families,
        "longest": [
            {"kernel": name[:160], "family": family(name), "ms": ms, "calls": calls}
            for name, (ms, calls) in longest
        ],
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
