"""One cell: train as many steps as it says, in this process, and say what that took.

    python -m olmo.bench.cell RECORD < the request, as JSON

The step is the trainer's own: its model, its microbatches, its clipping, its optimizer.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo.bench.matrix import Cell, Section
from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.precision import backends, msamp
from olmo.train.meters import device_flops
from olmo.train.optim import build_optimizer
from olmo.train.parallel import World, parallelize
from olmo.train.step import forward_backward

SEED = 6198


class Unavailable(Exception):
    """This cell cannot be had here, for a reason that is told."""


def measure(section: Section, cell: Cell) -> dict[str, Any]:
    """Train `warmup` steps, then `steps` that count; what that took.

    Raises:
        Unavailable: a kernel or a package that is not there.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    cfg = section.train_config(cell)
    if cfg.use_msamp and (problem := msamp.why_not(cfg)):
        raise Unavailable(problem)
    torch.manual_seed(SEED)
    model = OLMo(cfg.model.update_with(init_device="cpu"))
    asked = None if cell.attention == "auto" else cell.attention
    try:
        attention = model.use_attention(device, cfg.autocast_precision, asked)
        model.to(device)
        eight_bits = backends.prepare(model, cfg.fp8, device)[0] if cfg.fp8 else None
    except ValueError as error:
        raise Unavailable(str(error)) from error
    parallelize(cfg, model, World(0, 0, 1, device, ""))
    optimizer = build_optimizer(cfg, model)
    if cfg.use_msamp:
        _, optimizer = msamp.initialize(model, optimizer)
    model.train()
    base = memory(device)
    losses: list[Tensor] = []

    def step(number: int, batch: dict[str, Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        losses.append(forward_backward(model, batch, cfg, device, number).ce)
        optimizer.clip_grads_and_collect_metrics(number, collect_param_metrics=False)
        optimizer.step()
        if eight_bits is not None:
            eight_bits.after_step()

    began = time.monotonic()
    for number in range(section.warmup):
        step(number, batch_of(cfg, number))
        if number == 0:
            settle(device)
            first_step_s = time.monotonic() - began
    settle(device)
    joules = energy(device)
    cpu = time.process_time()
    batches = [batch_of(cfg, section.warmup + i) for i in range(section.steps)]
    seconds = timed(lambda i: step(section.warmup + i, batches[i]), section.steps, device)
    cpu = time.process_time() - cpu
    used = energy(device)
    tokens = cfg.global_train_batch_size * cfg.model.max_sequence_length
    speeds = sorted(tokens / one for one in seconds)
    median = statistics.median(speeds)
    peak = device_flops(device)

    def mfu(causal: bool) -> float | None:
        return median * model.flops_per_token(causal) / peak if peak else None

    every = [float(loss) for loss in losses]
    if not all(map(math.isfinite, every)):
        raise FloatingPointError(f"the loss is not finite: {every}")
    return {
        "attention_used": str(attention.backend),
        "parameters": model.num_params(),
        "tokens_per_step": tokens,
        "seconds": seconds,
        "tokens_per_second": median,
        "tokens_per_second_p10": speeds[len(speeds) // 10],
        "tokens_per_second_p90": speeds[-1 - len(speeds) // 10],
        "tokens_per_cpu_second": section.steps * tokens / cpu,
        "mfu_palm": mfu(causal=False),
        "mfu_causal": mfu(causal=True),
        "peak_memory_bytes": memory(device) if cuda else memory(device) - base,
        "joules_per_token": (
            None if joules is None or used is None else (used - joules) / section.steps / tokens
        ),
        "first_step_s": first_step_s,
        "first_loss": every[0],
        "last_loss": every[-1],
    }


def batch_of(cfg: TrainConfig, number: int) -> dict[str, Tensor]:
    """(B, T) ids that can be learnt, each a little above the one before; the same in every cell
    of one shape and microbatch."""
    generator = torch.Generator().manual_seed(SEED + number)
    shape = (cfg.global_train_batch_size, cfg.model.max_sequence_length)
    ids = torch.randint(0, 3, shape, generator=generator).cumsum(1)
    start = torch.randint(0, cfg.model.vocab_size, (shape[0], 1), generator=generator)
    return {"input_ids": (ids + start) % cfg.model.vocab_size, "index": torch.arange(shape[0])}


def timed(step: Callable[[int], None], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step; on a GPU by its own clock, so that nothing waits for it in between."""
    if device.type != "cuda":
        found = []
        for i in range(steps):
            began = time.perf_counter()
            step(i)
            found.append(time.perf_counter() - began)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for i in range(steps):
        step(i)
        marks[i + 1].record()
    settle(device)
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> int:
    """The most bytes so far: of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def energy(device: torch.device) -> float | None:
    """Joules that the GPU, or the processor, has used so far; None where nobody counts them."""
    if device.type == "cuda":
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except Exception:  # no package, or a card that does not count
            return None
    try:
        meters = list(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))
        return sum(int(meter.read_text()) for meter in meters) / 1e6 if meters else None
    except OSError:
        return None


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
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    record_path = Path(sys.argv[1])
    request = json.load(sys.stdin)
    section = Section.new(**request["section"])
    cell = Cell(**request["cell"])
    record = {"started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "cell": request["cell"]}
    try:
        record |= {"status": "ok", **measure(section, cell)}
    except Unavailable as error:
        record |= {"status": "unavailable", "why": str(error)}
    except torch.OutOfMemoryError as error:
        record |= {"status": "out of memory", "why": str(error).splitlines()[0]}
    except MemoryError as error:
        record |= {"status": "out of memory", "why": str(error) or "the machine's"}
    record_path.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
