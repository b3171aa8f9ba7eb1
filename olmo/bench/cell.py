"""One cell: train as many steps as it says, in this process, and say what that took.

    python -m olmo.bench.cell            a request a line, as JSON; each answered by its record
    python -m olmo.bench.cell --turns    beside a peer (side.serve)

The step is the trainer's own: its model, its microbatches, its clipping, its optimizer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo.bench.matrix import Cell, Section
from olmo.bench.side import (
    PeakMemory,
    Training,
    Unavailable,
    answers,
    fill,
    ids_of,
    limit_memory,
    out_of_memory,
    serve,
    settle,
    timed,
)
from olmo.data.order import available_memory
from olmo.distributed.parallelize import parallelize
from olmo.distributed.world import World
from olmo.model import OLMo
from olmo.optim.build import build_optimizer
from olmo.optim.master_weights import MasterWeights
from olmo.precision import backends, msamp
from olmo.runtime.energy import Joules
from olmo.train.meters import device_flops
from olmo.train.start import check_device
from olmo.train.step import clear_gradients, forward_backward, keep_freed_memory

# What a cell may be made of; another version is another record.
PACKAGES = ("torchao", "flash-attn", "flash-attn-3", "flash-attn-4", "msamp", "triton")


def prepare(section: Section, cell: Cell) -> Training:
    """The trainer's step, with the settings of a cell.

    Raises:
        Unavailable: a kernel or a package that is not there.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    cfg = section.train_config(cell)
    try:
        check_device(cfg, device, sharded=False)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    if not cuda:
        keep_freed_memory()
    model = OLMo(cfg.model.update_with(init_device="cpu"), init_params=False)
    fill(model)
    attention = model.use_attention(device, cfg.autocast_precision, cfg.attention)
    model.to(device)
    float8 = backends.convert_to_float8(model, cfg.fp8, device)[0] if cfg.fp8 else None
    if cfg.cross_entropy is not None:
        model.cross_entropy = cfg.cross_entropy
    parallelize(cfg, model, World(0, 0, 1, device, ""))
    optimizer = build_optimizer(cfg, model)
    if cfg.use_msamp:
        _, optimizer = msamp.initialize(model, optimizer)
    master_weights = MasterWeights(model, optimizer) if cfg.master_weights else None
    model.train()
    instances, length = cfg.global_train_batch_size, cfg.model.max_sequence_length
    index = torch.arange(instances)

    def step(number: int, ids: Tensor) -> Tensor:
        clear_gradients(optimizer, cfg)
        batch = {"input_ids": ids, "index": index}
        loss = forward_backward(model, batch, cfg, device, number).ce
        optimizer.clip_grads_and_collect_metrics(number, collect_param_metrics=False)
        optimizer.step()
        if master_weights is not None:
            master_weights.copy_to_model()
        if float8 is not None:
            float8.after_step()
        return loss * (length / (length - 1))  # OLMo's is divided by tokens, this by labels

    facts = {
        "attention_used": str(attention.backend),
        "parameters": model.num_params(),
        "flops_per_token_palm": model.flops_per_token(causal=False),
        "flops_per_token_causal": model.flops_per_token(causal=True),
        "device_flops": device_flops(device),
        "tokens_per_step": instances * length,
    }

    def ids(number: int) -> Tensor:
        found = ids_of(instances, length, cfg.model.vocab_size, number)
        return found.pin_memory() if cuda else found

    return Training(step, ids, device, facts)


def measure(section: Section, cell: Cell) -> dict[str, Any]:
    """Train `warmup` steps, then `steps` that count; what that took."""
    training = prepare(section, cell)
    device, facts = training.device, training.facts
    losses: list[Tensor | float] = []

    def step(number: int, ids: Tensor) -> None:
        losses.append(training.step(number, ids))

    began = time.monotonic()
    for number in range(section.warmup):
        step(number, training.ids(number))
        if number == 0:
            settle(device)
            first_step_s = time.monotonic() - began
    settle(device)
    numbers = range(section.warmup, section.warmup + section.steps)
    batches = [training.ids(number) for number in numbers]
    memory, joules, cpu = PeakMemory(device), energy(device), time.process_time()
    seconds = timed(lambda i: step(numbers[i], batches[i]), section.steps, device)
    cpu = time.process_time() - cpu
    used = joules()
    every = [float(loss) for loss in losses]
    if not all(map(math.isfinite, every)):
        raise FloatingPointError(f"the loss is not finite: {every}")
    tokens = facts["tokens_per_step"]
    return facts | {
        "seconds": seconds,
        "tokens_per_cpu_second": section.steps * tokens / cpu,
        "peak_memory_bytes": memory.bytes(),
        "joules_per_token": None if used is None else used / section.steps / tokens,
        "first_step_s": first_step_s,
        "first_loss": every[0],
        "last_loss": every[-1],
        "losses": every,
        **speeds(facts, seconds),
    }


def speeds(facts: Mapping[str, Any], seconds: list[float]) -> dict[str, float | None]:
    """Median and spread of the steps, and the median in both conventions of MFU.

    `facts` are those of our model: what a token costs is counted alike for all.
    """
    found = sorted(facts["tokens_per_step"] / one for one in seconds)
    median, peak = statistics.median(found), facts["device_flops"]
    return {
        "tokens_per_second": median,
        "tokens_per_second_p10": found[len(found) // 10],
        "tokens_per_second_p90": found[-1 - len(found) // 10],
        "mfu_palm": median * facts["flops_per_token_palm"] / peak if peak else None,
        "mfu_causal": median * facts["flops_per_token_causal"] / peak if peak else None,
    }


def energy(device: torch.device) -> Callable[[], float | None]:
    """What says, called, how many joules the GPU or the processor used since; None: not known."""
    if device.type != "cuda":
        return Joules().used
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    before = nvml_energy(uuid)

    def used() -> float | None:
        now = nvml_energy(uuid)
        return None if now is None or before is None else now - before

    return used


def nvml_energy(uuid: str) -> float | None:
    """A GPU's, by the driver's own library (nvml.h), which is there without a Python package."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value / 1000


def surroundings() -> dict[str, Any]:
    """What the speed depends on besides the cell."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "kind": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def record_of(section: Section, cell: Cell) -> dict[str, Any]:
    """The record of a cell; raises what is no result."""
    try:
        return {"status": "ok", **measure(section, cell)}
    except Unavailable as error:
        return {"status": "unavailable", "why": str(error)}
    except (RuntimeError, MemoryError, OSError) as error:
        if (why := out_of_memory(error)) is None:
            raise
        return {"status": "out of memory", "why": why}
    finally:  # the next cell begins as if it were the first
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    if sys.argv[1:] == ["--turns"]:
        serve(lambda request: prepare(Section.new(**request["section"]), Cell(**request["cell"])))
        return
    answer = answers()
    for line in sys.stdin:
        request = json.loads(line)
        section = Section.new(**request["section"])
        if not torch.cuda.is_available():
            limit_memory(section.memory_bytes or available_memory())
        answer(record_of(section, Cell(**request["cell"])))


if __name__ == "__main__":
    main()
