"""Numbers that are still on the device: they are fetched together, when somebody looks.

Asking for a number makes the host wait for the device, so a step only keeps tensors. Whether a
step was finite is among them, and nothing is logged or saved before that has been looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from olmo.train.parallel import World


class NotFinite(RuntimeError):
    """A gradient was NaN or infinite; weights and checkpoints are as before that step."""


@dataclass
class Pending:
    """One step: scalars on the device, and what the host knows already."""

    step: int
    ce: Tensor  # this process's
    z: Tensor | None
    failed: Tensor  # 1 if this step or one before it was not finite
    optim: dict[str, Tensor]  # the same on every process
    known: dict[str, float]
    instances: Tensor  # (B,) which this process computed


@dataclass
class Numbers:
    """Steps not fetched yet."""

    steps: list[Pending] = field(default_factory=list)

    def fetch(self, world: World) -> list[tuple[int, dict[str, float]]]:
        """(step, metrics) of all steps since the last time, losses averaged over processes.

        Raises NotFinite for the first step where something was not.
        """
        if not self.steps:
            return []
        steps, self.steps = self.steps, []
        own = torch.stack([t for p in steps for t in ([p.ce] if p.z is None else [p.ce, p.z])])
        mean = world.sum(own) / world.size
        rest = [t.to(own) for p in steps for t in (p.failed, *p.optim.values())]
        values = iter(torch.cat([mean, torch.stack(rest)]).tolist())

        out = []
        for p in steps:
            metrics = {"train/CrossEntropyLoss": next(values)}
            metrics["train/Perplexity"] = math.exp(min(metrics["train/CrossEntropyLoss"], 700.0))
            if p.z is not None:
                metrics["train/ZLoss"] = next(values)
            out.append((p.step, metrics))
        for p, (_, metrics) in zip(steps, out, strict=True):
            if next(values):
                raise _not_finite(p, world)
            metrics |= {f"optim/{name}": next(values) for name in p.optim} | p.known
        return out


def _not_finite(pending: Pending, world: World) -> NotFinite:
    own = (float(pending.ce), pending.instances.tolist())
    everyone = [own]
    if world.size > 1:
        everyone = [own] * world.size
        dist.all_gather_object(everyone, own)
    guilty = [part for part in everyone if not math.isfinite(part[0])] or everyone
    instances = [index for _, part in guilty for index in part]
    losses = ", ".join(f"{loss:.4g}" for loss, _ in everyone)
    return NotFinite(
        f"step {pending.step}: the gradient is not finite (loss of each process: {losses}). "
        f"Weights and checkpoints are those of step {pending.step - 1} and before. It came from "
        f"among these instances of the data: {instances}. To go on past them, "
        "--fast_forward_batches=1 with --load_path to the last checkpoint; or lower "
        "optimizer.learning_rate, or max_grad_norm"
    )
