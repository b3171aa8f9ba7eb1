"""Where metrics go besides metrics.jsonl and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from olmo.config.strict import BaseConfig


@dataclass
class WandbConfig(BaseConfig):
    """Weights & Biases, online or off (WANDB_MODE)."""

    project: str | None = None  # where runs are compared
    entity: str | None = None  # the team or account
    group: str | None = None  # of runs that belong together
    name: str | None = None  # of the run; null: run_name
    tags: list[str] | None = None  # to find it by
    log_artifacts: bool = False
    rank_zero_only: bool = True
    log_interval: int = 1  # steps


@dataclass
class TrackioConfig(BaseConfig):
    """Trackio: a tracker without an account, on this machine or a server of one's own."""

    project: str = "olmo"  # where runs are compared
    name: str | None = None  # of the run
    log_interval: int = 1  # steps


@dataclass
class TensorboardConfig(BaseConfig):
    """Event files for TensorBoard, in <save_folder>/tensorboard."""

    log_interval: int = 1  # steps
