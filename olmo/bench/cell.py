"""Times one cell in this process: a step is the trainer's own, with its model, clipping, optimizer.

python -m olmo.bench.cell            reads requests, a line of JSON each; replies with records
python -m olmo.bench.cell --turns    takes turns with a peer (timing.serve_turns)
"""

from __future__ import annotations

import contextlib
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

from olmo.bench import timing
from olmo.bench.matrix import Cell, Section
from olmo.bench.timing import Unavailable, Workload
from olmo.data.order import available_memory
from olmo.distributed.parallelize import parallelize
from olmo.distributed.world import World
from olmo.model import OLMo
from olmo.optim.build import build_optimizer
from olmo.optim.master_weights import MasterWeights
from olmo.precision import converters, msamp
from olmo.runtime.energy import EnergyMeter
from olmo.train.meters import device_flops
from olmo.train.step import clear_gradients, forward_backward, keep_freed_memory
from olmo.train.validate import check_device

# A cell's speed may depend on these; a record is measured again when a version changes.
PACKAGES = ("torchao", "flash-attn", "flash-attn-3", "flash-attn-4", "msamp", "triton")


def build_workload(section: Section, cell: Cell) -> Workload:
    """The trainer's step with a cell's settings.

    Raises:
        Unavailable: a kernel or a package is missing.
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
    timing.fill_weights(model)
    attention = model.use_attention(device, cfg.autocast_precision, cfg.attention)
    model.to(device)
    float8 = converters.convert_to_float8(model, cfg.fp8, device)[0] if cfg.fp8 else None
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
        return loss * (length / (length - 1))  # OLMo divides by tokens, this by labels

    def ids(number: int) -> Tensor:
        batch = timing.synthetic_ids(instances, length, cfg.model.vocab_size, number)
        return batch.pin_memory() if cuda else batch

    facts = {
        "attention_used": str(attention.backend),
        "parameters": model.num_params(),
        "flops_per_token_palm": model.flops_per_token(causal=False),
        "flops_per_token_causal": model.flops_per_token(causal=True),
        "device_flops": device_flops(device),
        "tokens_per_step": instances * length,
    }
    return Workload(step, ids, device, facts)


def time_cell(section: Section, cell: Cell) -> dict[str, Any]:
    """Train `warmup` steps, then `steps` that are timed; the numbers of a record.

    Raises:
        Unavailable: a kernel or a package is missing.
        FloatingPointError: a loss is not finite.
    """
    workload = build_workload(section, cell)
    device, facts = workload.device, workload.facts
    losses: list[Tensor | float] = []
    began = time.monotonic()
    for number in range(section.warmup):
        losses.append(workload.step(number, workload.ids(number)))
        if number == 0:
            timing.synchronize(device)
            first_step_s = time.monotonic() - began
    timing.synchronize(device)
    numbers = range(section.warmup, section.warmup + section.steps)
    batches = [workload.ids(number) for number in numbers]
    memory, joules, cpu = timing.PeakMemory(device), energy_meter(device), time.process_time()
    seconds = timing.time_steps(
        lambda i: losses.append(workload.step(numbers[i], batches[i])), section.steps, device
    )
    cpu = time.process_time() - cpu
    used = joules()
    floats = [float(loss) for loss in losses]
    if not all(map(math.isfinite, floats)):
        raise FloatingPointError(f"expected finite losses, found {floats}")
    tokens = facts["tokens_per_step"]
    return facts | {
        "seconds": seconds,
        "tokens_per_cpu_second": section.steps * tokens / cpu,
        "peak_memory_bytes": memory.bytes(),
        "joules_per_token": None if used is None else used / section.steps / tokens,
        "first_step_s": first_step_s,
        "first_loss": floats[0],
        "last_loss": floats[-1],
        "losses": floats,
        **throughput(facts, seconds),
    }


def throughput(facts: Mapping[str, Any], seconds: list[float]) -> dict[str, float | None]:
    """Median, 10th and 90th percentile of tokens per second, and the median as MFU.

    Args:
        facts: of our model, for a peer too: a token costs the same FLOPs on both sides.
        seconds: of each step.
    """
    rates = sorted(facts["tokens_per_step"] / step for step in seconds)
    median, peak = statistics.median(rates), facts["device_flops"]
    return {
        "tokens_per_second": median,
        "tokens_per_second_p10": rates[len(rates) // 10],
        "tokens_per_second_p90": rates[-1 - len(rates) // 10],
        "mfu_palm": median * facts["flops_per_token_palm"] / peak if peak else None,
        "mfu_causal": median * facts["flops_per_token_causal"] / peak if peak else None,
    }


def energy_meter(device: torch.device) -> Callable[[], float | None]:
    """A function that returns the joules that the GPU, or the processor, used since this call;
    None where there is no meter."""
    if device.type != "cuda":
        return EnergyMeter().joules
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    before = _read_nvml_joules(uuid)

    def used() -> float | None:
        now = _read_nvml_joules(uuid)
        return None if now is None or before is None else now - before

    return used


def _read_nvml_joules(uuid: str) -> float | None:
    """A GPU's energy counter, from the driver's library (nvml.h), which needs no package."""
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


def describe_machine() -> dict[str, Any]:
    """What a cell's speed depends on besides its settings and the code."""
    cuda = torch.cuda.is_available()
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "kind": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "packages": versions,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_cell(section: Section, cell: Cell) -> dict[str, Any]:
    """The record of a cell that was timed, is unavailable, or does not fit into memory. Other
    errors are raised."""
    try:
        return {"status": "ok", **time_cell(section, cell)}
    except Unavailable as error:
        return {"status": "unavailable", "why": str(error)}
    except (RuntimeError, MemoryError, OSError) as error:
        if (why := timing.out_of_memory_reason(error)) is None:
            raise
        return {"status": "out of memory", "why": why}
    finally:  # the next cell starts from a clean process
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def parse_request(request: Mapping[str, Any]) -> tuple[Section, Cell]:
    return Section.new(**request["section"]), Cell(**request["cell"])


def main() -> None:
    if sys.argv[1:] == ["--turns"]:
        timing.serve_turns(lambda request: build_workload(*parse_request(request)))
        return
    send = timing.open_reply_stream()
    for line in sys.stdin:
        section, cell = parse_request(json.loads(line))
        if not torch.cuda.is_available():
            timing.limit_memory(section.memory_bytes or available_memory())
        send(run_cell(section, cell))


if __name__ == "__main__":
    main()
