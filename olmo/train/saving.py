"""When a run saves what, and from which objects."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olmo.checkpoint import layout
from olmo.checkpoint.save import save_unsharded
from olmo.config import TrainConfig, to_yaml
from olmo.log import tell
from olmo.train.parallel import World
from olmo.train.start import Position


class Saver:
    """Saves a run at the intervals of its config and at its end, each step once."""

    def __init__(
        self,
        cfg: TrainConfig,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: Position,
    ) -> None:
        self._cfg, self._world, self._folder = cfg, world, Path(cfg.save_folder).absolute()
        self._model, self._optimizer, self._position = model, optimizer, position
        self.saved: Path | None = None  # the newest

    def due(self, step: int, last: bool) -> bool:
        """Whether something is saved at this step."""
        return last or _hits(self._cfg.save_interval_unsharded, step)

    def save(self) -> Path:
        """Save now, if this step is not saved yet; the folder."""
        step = self._position.global_step
        folder = self._folder / layout.folder_name(step, unsharded=True)
        if self.saved != folder:
            # Gathering shards takes every process, writing one.
            model = _kept(dict(self._model.state_dict()))
            optim = _kept(self._optimizer.state_dict())
            if self._world.first:
                save_unsharded(
                    self._folder,
                    step,
                    config_yaml=to_yaml(self._cfg.asdict()),
                    model=model,
                    optim=optim,
                    train=train_state(self._position, self._world.size),
                    keep=self._cfg.save_num_unsharded_checkpoints_to_keep or 1,
                )
            self.saved = folder
            tell(f"saved {folder}")
            self._world.wait()
        return folder


def train_state(position: Position, world_size: int) -> dict[str, Any]:
    """What train.pt holds; OLMo wants the lists to be there."""
    lists: dict[str, list[str]] = {
        "checkpoints": [],
        "unsharded_checkpoints": [],
        "ephemeral_checkpoints": [],
    }
    return {**asdict(position), "world_size": world_size, **lists}


def _hits(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def _kept(value: Any) -> Any:
    """Whole tensors on the host, in containers of the same kind."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _kept(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_kept(v) for v in value)
    return value
