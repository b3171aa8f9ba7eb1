"""OLMo's class to save and load an unsharded checkpoint by hand. Our trainer does not use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from olmo.checkpoint import layout
from olmo.checkpoint.optim_state import load_named_state
from olmo.checkpoint.read import load_checkpoint
from olmo.checkpoint.torch_files import save_torch_file
from olmo.config import TrainConfig
from olmo.model.regroup import regroup_state_dict


class FullCheckpointer:
    """Checkpoints of an unsharded model, in torch's DistributedDataParallel or not.

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
        """Write model.pt, optim.pt, train.pt and the config to the folder `dir`, atomically.

        Raises ValueError if it exists, unless cfg.save_overwrite.
        """
        folder = Path(dir)
        if folder.exists() and not self.cfg.save_overwrite:
            raise ValueError(f"{folder} already exists; set save_overwrite to replace it")
        with layout.atomic_checkpoint(folder) as partial:
            self.cfg.save(partial / "config.yaml")
            save_torch_file(_unwrapped(dist_model).state_dict(), partial / "model.pt")
            save_torch_file(optim.state_dict(), partial / "optim.pt")
            save_torch_file(train_state, partial / "train.pt")

    def restore_checkpoint(
        self,
        load_path: str | Path,
        dist_model: nn.Module,
        optim: torch.optim.Optimizer,
        *,
        load_optimizer_state: bool = True,
    ) -> dict[str, Any]:
        """Load weights and optimizer state; returns the trainer state.

        Raises RuntimeError or ValueError if they are another model's.
        """
        model = _unwrapped(dist_model)
        size = getattr(getattr(model, "config", None), "block_group_size", 1)
        checkpoint = load_checkpoint(load_path, optimizer=load_optimizer_state)
        model.load_state_dict(regroup_state_dict(checkpoint.model, size)[0])
        if checkpoint.optim is not None:
            load_named_state(optim, *checkpoint.optim)
        return checkpoint.train or {}

    def load_checkpoint(
        self,
        load_path: str | Path,
        *,
        load_optimizer_state: bool = True,
        device: torch.device | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """The weights, and the optimizer's `state` and `param_groups` by parameters' names."""
        checkpoint = load_checkpoint(load_path, optimizer=load_optimizer_state, trainer=False)
        weights = {name: tensor.to(device) for name, tensor in checkpoint.model.items()}
        if checkpoint.optim is None:
            return weights, None
        state, groups = checkpoint.optim
        on_device = {
            name: {k: v.to(device) if torch.is_tensor(v) else v for k, v in parts.items()}
            for name, parts in state.items()
        }
        named_groups = [{**group, "params": group["param_names"]} for group in groups]
        return weights, {"state": on_device, "param_groups": named_groups}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's DistributedDataParallel, or itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
