"""Where metrics go besides metrics.jsonl and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from olmo.config.strict import BaseConfig


@dataclass
class WandbConfig(BaseConfig):
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] | None = None
    log_artifacts: bool = False
    rank_zero_only: bool = True
    log_interval: int = 1


@dataclass
class TrackioConfig(BaseConfig):
    """Trackio: a tracker without an account, on this machine or a server of one's own."""

    project: str = "olmo"
    name: str | None = None  # of the run
    log_interval: int = 1  # steps


@dataclass
class TensorboardConfig(BaseConfig):
    """Event files for TensorBoard, in <save_folder>/tensorboard."""

    log_interval: int = 1  # steps
