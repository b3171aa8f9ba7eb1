"""One side of a comparison: a training step, measured, one turn at a time.

Needs torch alone, and nothing of ours: peer.py, which runs in another Python where `olmo` is AI2's
package, finds this file beside it.

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
    """This is not available here, for a reason that is told."""


@dataclass
class Training:
    """Something that trains."""

    step: Callable[[int, Tensor], Tensor | float]  # number, ids (B, T): the mean loss over labels
    ids: Callable[[int], Tensor]  # of the step of that number
    device: torch.device
    facts: dict[str, Any] = field(default_factory=dict)


# What all sides share: ids, weights, clock, memory.


def ids_of(instances: int, length: int, vocabulary: int, number: int) -> Tensor:
    """(B, T) ids of step `number` that can be learnt, each a little above the one before."""
    generator = torch.Generator().manual_seed(SEED + number)
    ids = torch.randint(0, 3, (instances, length), generator=generator).cumsum(1)
    start = torch.randint(0, vocabulary, (instances, 1), generator=generator)
    return (ids + start) % vocabulary


def weights_of(name: str, shape: Sequence[int]) -> Tensor:
    """The matrix of that name in OLMo's state dict: the same on every side."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator) * 0.02


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every matrix of a model with OLMo's names its weights, biases 0; norms stay as built."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.copy_(weights_of(name, weight.shape))
        elif name.endswith("bias"):
            weight.zero_()


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
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most bytes since this was made: of the GPU's memory, or of this process beyond what it
    had then."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.base, self.forgets = device, 0, False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        try:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")  # forget the highest so far
            self.base, self.forgets = resident("VmRSS"), True
        except OSError:
            self.base = highest_ever()

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return (resident("VmHWM") if self.forgets else highest_ever()) - self.base


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def highest_ever() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(most: int | None) -> None:
    """No more than `most` bytes for this process: then an allocation fails, and not the machine."""
    if most is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def out_of_memory(error: BaseException) -> str | None:
    """What an error says of memory; None if it is of something else."""
    lines = str(error).splitlines()
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return lines[0] if lines else "the machine's"
    # On a CPU torch and its libraries raise what they have.
    signs = ("allocate memory", "not enough memory", "bad_alloc")
    told = (line for line in lines if any(sign in line for sign in signs))
    return next(told, None) if isinstance(error, RuntimeError | OSError) else None


# Turns.


def serve(build: Callable[[dict[str, Any]], Training]) -> None:
    """Build what the first line of stdin asks for, then take as many steps as each line says.

    Each line is answered by one, in JSON: what was built, what the steps took, or why not.
    """
    send = answers()

    def answer(status: str, **facts: Any) -> None:
        send({"status": status, **facts})

    request = json.loads(sys.stdin.readline())
    try:
        if request["kind"] == "cpu":
            limit_memory(request["memory_bytes"])
        torch.set_num_threads(request["threads"])
        take_turns(build(request), answer)
    except Unavailable as error:
        answer("unavailable", why=str(error))
    except (RuntimeError, MemoryError, OSError) as error:
        if (why := out_of_memory(error)) is None:
            raise
        answer("out of memory", why=why)


def answers() -> Callable[[dict[str, Any]], None]:
    """What sends an answer, a line of JSON, to whoever started this process. All else that is
    printed from now on goes to stderr."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda answer: print(json.dumps(answer), file=stdout, flush=True)


def take_turns(training: Training, answer: Callable[..., None]) -> None:
    python = platform.python_version()
    answer("ready", **training.facts, torch=torch.__version__, python=python)
    done = 0
    for line in sys.stdin:
        numbers = range(done, done + int(line))
        batches = [training.ids(number) for number in numbers]
        losses: list[Tensor | float] = []

        def step(i: int, turn: Any = (numbers, batches, losses)) -> None:
            numbers, batches, losses = turn
            losses.append(training.step(numbers[i], batches[i]))

        memory, cpu = PeakMemory(training.device), time.process_time()
        seconds = timed(step, len(numbers), training.device)
        cpu = time.process_time() - cpu
        done = numbers.stop
        answer(
            "ok",
            seconds=seconds,
            cpu=cpu,
            peak_memory_bytes=memory.bytes(),
            losses=[float(loss) for loss in losses],
        )
