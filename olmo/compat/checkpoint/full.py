"""OLMo's way to save and load an unsharded checkpoint by hand; the trainer has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from olmo.checkpoint import layout, plain
from olmo.checkpoint.optim_state import load_by_name
from olmo.checkpoint.read import load
from olmo.config import TrainConfig
from olmo.model.regroup import regrouped


class FullCheckpointer:
    """Of a model in this process's memory, wrapped in torch's DistributedDataParallel or not.

    checkpointer = FullCheckpointer(cfg)
    checkpointer.save_checkpoint("step10-unsharded", model, optim, {"global_step": 10})
    trainer_state = checkpointer.restore_checkpoint("step10-unsharded", model, optim)
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg

    def save_checkpoint(
        self,
        dir: str | Path,
        dist_model: nn.Module,
        optim: torch.optim.Optimizer,
        train_state: dict[str, Any],
    ) -> None:
        """Write model.pt, optim.pt, train.pt and the config to the folder `dir`, or nothing.

        Raises ValueError where it is there already, unless cfg.save_overwrite.
        """
        folder = Path(dir)
        if folder.exists() and not self.cfg.save_overwrite:
            raise ValueError(f"{folder} is there already; set save_overwrite to replace it")
        with layout.writing(folder) as partial:
            self.cfg.save(partial / "config.yaml")
            plain.write(_unwrapped(dist_model).state_dict(), partial / "model.pt")
            plain.write(optim.state_dict(), partial / "optim.pt")
            plain.write(train_state, partial / "train.pt")

    def restore_checkpoint(
        self,
        load_path: str | Path,
        dist_model: nn.Module,
        optim: torch.optim.Optimizer,
        *,
        load_optimizer_state: bool = True,
    ) -> dict[str, Any]:
        """Put a checkpoint's weights and optimizer state in place; gives its trainer state.

        Raises RuntimeError or ValueError where they are another model's.
        """
        model = _unwrapped(dist_model)
        size = getattr(getattr(model, "config", None), "block_group_size", 1)
        checkpoint = load(load_path, optimizer=load_optimizer_state)
        model.load_state_dict(regrouped(checkpoint.model, size)[0])
        if checkpoint.optim is not None:
            load_by_name(optim, *checkpoint.optim)
        return checkpoint.train or {}

    def load_checkpoint(
        self,
        load_path: str | Path,
        *,
        load_optimizer_state: bool = True,
        device: torch.device | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """The weights, and the optimizer's `state` and `param_groups` by parameters' names."""
        checkpoint = load(load_path, optimizer=load_optimizer_state, trainer=False)
        weights = {name: tensor.to(device) for name, tensor in checkpoint.model.items()}
        if checkpoint.optim is None:
            return weights, None
        state, groups = checkpoint.optim
        on_device = {
            name: {k: v.to(device) if torch.is_tensor(v) else v for k, v in kept.items()}
            for name, kept in state.items()
        }
        named = [{**group, "params": group["param_names"]} for group in groups]
        return weights, {"state": on_device, "param_groups": named}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's DistributedDataParallel, or itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
