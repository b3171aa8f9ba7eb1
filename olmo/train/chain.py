"""Long runs as a chain: cut at steps into links, each a job and an artifact of its own.

A link is what a run is at a step, `checkpoints/<run>/step-<n>`. It is asked for by what decides
bytes up to there, and by the content of the link before it. So two runs that begin alike share
their links: with a schedule that does not look at the end (warmup_stable_decay before its decay,
constant, inverse square root) also runs of different lengths. The last piece is the run's final
checkpoint, whose content is that of a run which was not cut.
"""

import math
from typing import Any

from olmo.config import SchedulerType, SchedulerUnits, TrainConfig
from olmo.config.identity import identity

# What of a final checkpoint, or of a link, a run can go on from.
STATE = ("model.safetensors", "optim.safetensors", "train.json")

FAR = 2**60  # an end so far away that no schedule notices it


def steps(cfg: TrainConfig) -> int | None:
    """How many steps a run has; None where that depends on its data ("2ep")."""
    found, unit = cfg.duration
    if unit == "epochs":
        return None
    if unit == "tokens":
        found = math.ceil(found / (cfg.global_train_batch_size * cfg.model.max_sequence_length))
    return min(found, cfg.stop_at or found)


def cuts(cfg: TrainConfig, at: list[int], every: int | None) -> list[int]:
    """The steps at which a run is cut: `at` those, or at the multiples of `every`, before its end.

    Raises:
        ValueError: they cannot be, or the end is not known.
    """
    if not at and every is None:
        return []
    end = steps(cfg)
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


def beginning(cfg: TrainConfig, until: int) -> dict[str, Any]:
    """What decides the bytes of a run up to step `until`, as `olmo.config.identity` gives it.

    How long the run is, and how its learning rate falls at the end, is left out where nothing of
    it is felt before `until`.
    """
    settings = identity(cfg)
    if not end_matters(cfg, until):
        for name in ("max_duration", "stop_at"):
            settings.pop(name, None)
        if cfg.scheduler.name == SchedulerType.warmup_stable_decay and cfg.scheduler.t_max is None:
            settings["scheduler"] = {
                name: value
                for name, value in settings.get("scheduler", {}).items()
                if name not in ("t_decay", "alpha_f")
            }
    return settings


def end_matters(cfg: TrainConfig, until: int) -> bool:
    """Whether a learning rate up to step `until` depends on where the run ends."""
    from olmo.optim.schedule import build_scheduler

    scheduler, peak = build_scheduler(cfg), cfg.optimizer.learning_rate
    unit = 1
    if cfg.scheduler.units == SchedulerUnits.tokens:
        unit = cfg.global_train_batch_size * cfg.model.max_sequence_length
    end = (steps(cfg) or until) * unit
    return any(
        scheduler.get_lr(peak, step * unit, end) != scheduler.get_lr(peak, step * unit, FAR)
        for step in range(1, until + 1)
    )
