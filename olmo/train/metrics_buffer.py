"""Numbers of a step, on their way from the device to the host: nobody waits for them.

Reading a number makes the host wait until the device has computed it, and then the device waits
for the host's next step. So the numbers of a step are copied while later steps are computed, and
read when they have arrived. Whether a step was finite is among them. Before anything is saved the
rest is waited for.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from olmo.distributed.world import World
from olmo.runtime.numbers import perplexity
from olmo.runtime.process import LAUNCHED_ENV
from olmo.train.step import Losses

Row = tuple[int, dict[str, float]]
"""A step and its metrics, by OLMo's names."""


class NotFinite(RuntimeError):
    """A gradient was NaN or infinite; weights and checkpoints are as before that step."""


@dataclass
class PendingStep:
    """One step."""

    step: int
    names: list[str]  # of `values`
    values: Tensor  # on the host, there once `copied` has happened
    copied: torch.cuda.Event | None  # None: they are there
    known: dict[str, float]
    loss: Tensor  # this process's, on the device
    instances: Tensor  # (B,) which this process computed


class MetricsBuffer:
    """Steps whose numbers nobody has seen, the oldest first.

    All processes call `add` and `fetch` together. `arrived` depends on how far this process's
    device is: what is decided by it has to be agreed upon with the others.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._steps: deque[PendingStep] = deque()
        self.failed = False
        """Whether a step has arrived here that was not finite: then `fetch` raises everywhere."""

    def add(
        self,
        step: int,
        losses: Losses,
        failed: Tensor,
        optim: dict[str, Tensor],
        known: dict[str, float],
        instances: Tensor,
    ) -> None:
        """Send a step's numbers on their way.

        Args:
            losses: of this process; their mean over processes is told.
            failed: 1 if this step or one before it was not finite. The same on every process, as
                is `optim`.
            known: what the host knows already.
            instances: (B,), which this process computed.
        """
        own = [losses.ce] if losses.z is None else [losses.ce, losses.z]
        mean = self._world.sum(torch.stack(own)) / self._world.size
        values = torch.cat([mean, torch.stack([t.to(mean) for t in (failed, *optim.values())])])
        copied = None
        if values.is_cuda:
            values, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        names = ["train/CrossEntropyLoss", "train/ZLoss"][: len(own)]
        names += ["failed", *(f"optim/{name}" for name in optim)]
        self._steps.append(PendingStep(step, names, values, copied, known, losses.ce, instances))

    def arrived(self) -> list[Row]:
        """The steps that have arrived since the last time, up to one that was not finite."""
        rows: list[Row] = []
        while self._steps and not self.failed:
            copied = self._steps[0].copied
            if copied is not None and not copied.query():
                break
            row = self._row(self._steps[0])
            if not self.failed:
                rows.append(row)
                self._steps.popleft()
        return rows

    def fetch(self, write: Callable[[int, dict[str, float]], None]) -> list[Row]:
        """All steps that nobody has seen; waits for them.

        Raises:
            NotFinite: for the first step that was not finite, once those before it are written.
        """
        if self._steps and (copied := self._steps[-1].copied) is not None:
            copied.synchronize()
        rows = self.arrived()
        if self.failed:
            for row in rows:
                write(*row)
            raise _not_finite(self._steps[0], self._world)
        return rows

    def _row(self, pending: PendingStep) -> Row:
        metrics = dict(zip(pending.names, pending.values.tolist(), strict=True))
        self.failed = bool(metrics.pop("failed"))
        metrics["train/Perplexity"] = perplexity(metrics["train/CrossEntropyLoss"])
        return pending.step, metrics | pending.known


def _not_finite(pending: PendingStep, world: World) -> NotFinite:
    own = (float(pending.loss), pending.instances.tolist())
    everyone = [own]
    if world.size > 1:
        everyone = [own] * world.size
        dist.all_gather_object(everyone, own)
    guilty = [part for part in everyone if not math.isfinite(part[0])] or everyone
    instances = [index for _, part in guilty for index in part]
    past = ""
    if LAUNCHED_ENV not in os.environ:  # no run of the pipeline leaves batches out
        past = (
            "; or go on past them by --try_load_latest_save --fast_forward_batches=N, once: N is "
            f"{pending.step} less the newest checkpoint's step"
        )
    losses = ", ".join(f"{loss:.4g}" for loss, _ in everyone)
    return NotFinite(
        f"step {pending.step}: the gradient is not finite (loss of each process: {losses}). "
        f"Weights and checkpoints are those of step {pending.step - 1} and before. It came from "
        f"among these instances of the data: {instances}. Lower optimizer.learning_rate or "
        f"max_grad_norm{past}"
    )
