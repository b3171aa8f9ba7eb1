"""Metrics on their way from the device to the host, without a synchronization.

`tensor.item()` makes the host wait for the device, and then the device idles until the host has
launched the next step. So the metrics of a step are copied asynchronously while later steps run,
and read when they have arrived. Whether the step's gradient was finite is among them. Before
anything is saved the loop waits for all of them.
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
    """A step whose metrics are being copied."""

    step: int
    names: list[str]  # of `values`
    values: Tensor  # on the host, valid once `copied` has happened
    copied: torch.cuda.Event | None  # None: valid already
    known: dict[str, float]
    loss: Tensor  # this process's, on the device
    instances: Tensor  # (B,) of this process


class MetricsBuffer:
    """Steps whose metrics have not been read yet, the oldest first.

    `add` and `fetch` are collective. `arrived` depends on how far this process's device is:
    processes must agree before they act on it.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._steps: deque[PendingStep] = deque()
        self.failed = False
        """Whether a step that was not finite has arrived: then `fetch` raises, on all processes."""

    def add(
        self,
        step: int,
        losses: Losses,
        failed: Tensor,
        optim: dict[str, Tensor],
        known: dict[str, float],
        instances: Tensor,
    ) -> None:
        """Start to copy a step's metrics.

        Args:
            losses: of this process; their mean over processes is reported.
            failed: (), 1 if this step or one before it was not finite. Equal on all processes, as
                is `optim`.
            known: metrics that are on the host already.
            instances: (B,), of this process.
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
        """Steps that have arrived since the last call, up to one that was not finite."""
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
        """All steps that have not been read; waits for them.

        Raises:
            NotFinite: for the first step that was not finite, after those before it are written.
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
    suspects = [part for part in everyone if not math.isfinite(part[0])] or everyone
    instances = [index for _, part in suspects for index in part]
    skip = ""
    if LAUNCHED_ENV not in os.environ:  # a run of the pipeline never skips batches
        skip = (
            "; or skip them by --try_load_latest_save --fast_forward_batches=N, once: N is "
            f"{pending.step} less the newest checkpoint's step"
        )
    losses = ", ".join(f"{loss:.4g}" for loss, _ in everyone)
    return NotFinite(
        f"step {pending.step}: the gradient is not finite (loss of each process: {losses}). "
        f"Weights and checkpoints are those of step {pending.step - 1} and before. It came from "
        f"among these instances of the data: {instances}. Lower optimizer.learning_rate or "
        f"max_grad_norm{skip}"
    )
