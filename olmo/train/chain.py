"""Long runs as a chain of links, each a job and an artifact of its own.

A link is the run's state at a step, `checkpoints/<run>/step-<n>`. Its action contains what decides
bytes up to that step, and the content of the link before it. So two runs with the same beginning
share links; so do runs of different lengths, if the schedule does not depend on the end
(warmup_stable_decay before its decay, constant, inverse square root). The last piece is the run's
final checkpoint, with the content of an uncut run.
"""

import math
from typing import Any

from olmo.config import SchedulerType, SchedulerUnits, TrainConfig
from olmo.config.identity import identity

# The files of a link, or of a final checkpoint, that a run can resume from.
STATE = ("model.safetensors", "optim.safetensors", "train.json")

FAR = 2**60  # an end so far away that no schedule notices it


def count_steps(cfg: TrainConfig) -> int | None:
    """Steps of the run; None where that depends on its data ("2ep")."""
    found, unit = cfg.duration
    if unit == "epochs":
        return None
    if unit == "tokens":
        found = math.ceil(found / (cfg.global_train_batch_size * cfg.model.max_sequence_length))
    return min(found, cfg.stop_at or found)


def list_link_steps(cfg: TrainConfig, at: list[int], every: int | None) -> list[int]:
    """The steps of a run's links: `at`, or the multiples of `every` before its end.

    Raises:
        ValueError: steps out of order or beyond the end, or the end is not known.
    """
    if not at and every is None:
        return []
    end = count_steps(cfg)
    if at and every is not None:
        raise ValueError("links and link_every: expected one of them, found both")
    if every is not None:
        if every < 1:
            raise ValueError(f"link_every: expected at least 1, found {every}")
        if end is None:
            raise ValueError(
                f"link_every needs a max_duration in steps or tokens, found {cfg.max_duration}; "
                "name the steps: links: [1000, 2000]"
            )
        return list(range(every, end, every))
    if at != sorted(set(at)) or at[0] < 1 or (end is not None and at[-1] >= end):
        raise ValueError(f"links: expected rising steps from 1 to below {end}, found {at}")
    return at


def identity_until(cfg: TrainConfig, until: int) -> dict[str, Any]:
    """The part of `olmo.config.identity` that decides the bytes up to step `until`.

    Without the run's length and its final decay where these have no effect before `until`.
    """
    settings = identity(cfg)
    if not depends_on_end(cfg, until):
        for name in ("max_duration", "stop_at"):
            settings.pop(name, None)
        if cfg.scheduler.name == SchedulerType.warmup_stable_decay and cfg.scheduler.t_max is None:
            settings["scheduler"] = {
                name: value
                for name, value in settings.get("scheduler", {}).items()
                if name not in ("t_decay", "alpha_f")
            }
    return settings


def depends_on_end(cfg: TrainConfig, until: int) -> bool:
    """Whether a learning rate up to step `until` depends on where the run ends."""
    from olmo.optim.schedule import build_scheduler

    scheduler, peak = build_scheduler(cfg), cfg.optimizer.learning_rate
    unit = 1
    if cfg.scheduler.units == SchedulerUnits.tokens:
        unit = cfg.global_train_batch_size * cfg.model.max_sequence_length
    end = (count_steps(cfg) or until) * unit
    return any(
        scheduler.get_lr(peak, step * unit, end) != scheduler.get_lr(peak, step * unit, FAR)
        for step in range(1, until + 1)
    )
