"""Where the time of a cell's step goes on a GPU: by family of kernels, and the twenty longest.

On a CPU by torch's operations. One line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from olmo.bench.cell import prepare
from olmo.bench.matrix import Cell, Section
from olmo.bench.side import settle

STEPS, WARMUP, LONGEST = 3, 4, 20
# The first whose words a kernel's name has.
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
    cell = Cell(**request["cell"])
    training = prepare(Section.new(**request["section"]), cell)
    device = training.device
    batches = [training.ids(number) for number in range(WARMUP + STEPS)]
    for number in range(WARMUP):
        training.step(number, batches[number])
    settle(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        for number in range(WARMUP, WARMUP + STEPS):
            training.step(number, batches[number])
        settle(device)
    on_gpu = device.type == "cuda"
    totals: dict[str, tuple[float, int]] = {}
    for event in found.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        is_kernel = not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
        if time and is_kernel:
            totals[event.key] = (time / 1e3 / STEPS, event.count // STEPS)
    families: dict[str, list[float]] = {}
    for name, (milliseconds, calls) in totals.items():
        so_far = families.setdefault(family(name), [0.0, 0])
        so_far[0] += milliseconds
        so_far[1] += calls
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:LONGEST]
    record: dict[str, Any] = {
        "cell": request["cell"],
        "steps": STEPS,
        "ms": sum(milliseconds for milliseconds, _ in totals.values()),
        "families": {n: {"ms": ms, "calls": calls} for n, (ms, calls) in families.items()},
        "longest": [
            {"kernel": name[:160], "family": family(name), "ms": ms, "calls": calls}
            for name, (ms, calls) in longest
        ],
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
