"""What each side of a comparison needs: synthetic ids and weights, timing, peak memory, turns.

Imports torch and nothing of ours: peer.py runs in another Python, where `olmo` is AI2's package,
and imports this file from its own folder.

Shapes: B instances, T tokens.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

SEED = 6198


class Unavailable(Exception):
    """A kernel or a package is not available here; the message says why."""


@dataclass
class Workload:
    """A training step that can be timed."""

    step: Callable[[int, Tensor], Tensor | float]  # number, ids (B, T) → mean loss over labels
    ids: Callable[[int], Tensor]  # number of the step → ids (B, T)
    device: torch.device
    facts: dict[str, Any] = field(default_factory=dict)


def synthetic_ids(instances: int, length: int, vocab_size: int, number: int) -> Tensor:
    """(B, T) ids of step `number` that can be learnt: each is 0 to 2 above the one before."""
    generator = torch.Generator().manual_seed(SEED + number)
    ids = torch.randint(0, 3, (instances, length), generator=generator).cumsum(1)
    start = torch.randint(0, vocab_size, (instances, 1), generator=generator)
    return (ids + start) % vocab_size


def synthetic_weight(name: str, shape: Sequence[int]) -> Tensor:
    """The matrix of that name in OLMo's state dict: the same on every side."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator) * 0.02


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Set the matrices of a model with OLMo's names, and biases to 0; norms stay as built."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.copy_(synthetic_weight(name, weight.shape))
        elif name.endswith("bias"):
            weight.zero_()


def time_steps(step: Callable[[int], object], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step; on a GPU by CUDA events, so that the host does not wait in between."""
    if device.type != "cuda":
        seconds = []
        for i in range(steps):
            began = time.perf_counter()
            step(i)
            seconds.append(time.perf_counter() - began)
        return seconds
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for i in range(steps):
        step(i)
        marks[i + 1].record()
    synchronize(device)
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak bytes since this was made: allocated on the GPU, or of this process beyond what it had
    at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start, self.can_reset = device, 0, False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        try:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")  # resets VmHWM
            self.start, self.can_reset = _memory_status("VmRSS"), True
        except OSError:
            self.start = _max_rss()

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return (_memory_status("VmHWM") if self.can_reset else _max_rss()) - self.start


def _memory_status(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(most: int | None) -> None:
    """Limit this process to `most` bytes, so that an allocation fails before the machine does."""
    if most is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def out_of_memory_reason(error: BaseException) -> str | None:
    """The line of an error that is about memory; None if the error is about something else."""
    lines = str(error).splitlines()
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return lines[0] if lines else "out of memory"
    # On a CPU torch and its libraries raise errors of several classes.
    signs = ("allocate memory", "not enough memory", "bad_alloc")
    found = (line for line in lines if any(sign in line for sign in signs))
    return next(found, None) if isinstance(error, RuntimeError | OSError) else None


def open_reply_stream() -> Callable[[dict[str, Any]], None]:
    """A function that sends a line of JSON to the parent process. Everything else that is printed
    from now on goes to stderr."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda reply: print(json.dumps(reply), file=stdout, flush=True)


def serve_turns(build: Callable[[dict[str, Any]], Workload]) -> None:
    """Build the workload of stdin's first line (JSON), then train as many steps as each further
    line says. Every line gets one reply: what was built, what the steps took, or a failure."""
    send = open_reply_stream()
    request = json.loads(sys.stdin.readline())
    try:
        if request["kind"] == "cpu":
            limit_memory(request["memory_bytes"])
        torch.set_num_threads(request["threads"])
        workload, done = build(request), 0
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        send({"status": "ready", **workload.facts, **versions})
        for line in sys.stdin:
            send({"status": "ok", **_take_turn(workload, range(done, done + int(line)))})
            done += int(line)
    except Unavailable as error:
        send({"status": "unavailable", "why": str(error)})
    except (RuntimeError, MemoryError, OSError) as error:
        if (why := out_of_memory_reason(error)) is None:
            raise
        send({"status": "out of memory", "why": why})


def _take_turn(workload: Workload, numbers: range) -> dict[str, Any]:
    """Train the steps of these numbers: seconds, CPU seconds, peak bytes, losses."""
    batches = [workload.ids(number) for number in numbers]
    losses: list[Tensor | float] = []
    memory, cpu = PeakMemory(workload.device), time.process_time()
    seconds = time_steps(
        lambda i: losses.append(workload.step(numbers[i], batches[i])),
        len(numbers),
        workload.device,
    )
    cpu = time.process_time() - cpu
    peak = memory.bytes()
    floats = [float(loss) for loss in losses]
    return {"seconds": seconds, "cpu": cpu, "peak_memory_bytes": peak, "losses": floats}
