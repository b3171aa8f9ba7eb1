"""The pipeline's final folder: plain names, plain values, and the same bytes for the same run.

config.yaml         the settings that decide these bytes
model.safetensors   weights by parameter name
optim.safetensors   optimizer state as `part/parameter name`
train.json          step, tokens, epoch, the optimizer's group settings
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from olmo.checkpoint.optim_state import State
from olmo.checkpoint.read import load_checkpoint
from olmo.config import to_yaml
from olmo.io import sealed
from olmo.runtime.numbers import to_json
from olmo.runtime.process import FINISHED_FILE


def export_final(
    save_folder: str | Path, out: str | Path, config: dict[str, Any]
) -> dict[str, Any]:
    """Write the last checkpoint of a finished run as a final folder; returns train.json's content.

    `config` becomes config.yaml: `olmo.config.identity.identity(cfg)` with content addresses
    instead of paths. No time, path or host is written. `out` may exist, but must be empty.

    Raises ValueError for a run that has not finished, and for a broken checkpoint.
    """
    save_folder, out = Path(save_folder), Path(out)
    marker = save_folder / FINISHED_FILE
    if not marker.exists():
        raise ValueError(f"the run in {save_folder} has not finished; train it further")
    checkpoint = load_checkpoint(save_folder / sealed.load_file(marker)["checkpoint"])
    assert checkpoint.optim is not None and checkpoint.train is not None
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty")

    (out / "config.yaml").write_text(to_yaml(config))
    state, groups = checkpoint.optim
    write_safetensors(out, checkpoint.model, state)
    train = {
        "global_step": checkpoint.train["global_step"],
        "global_train_tokens_seen": checkpoint.train["global_train_tokens_seen"],
        "global_train_examples_seen_this_epoch": checkpoint.train[
            "global_train_examples_seen_this_epoch"
        ],
        "epoch": checkpoint.train["epoch"],
        "world_size": checkpoint.train["world_size"],
        "optimizer": groups,
    }
    (out / "train.json").write_text(to_json(train, indent=1, sort_keys=True) + "\n")
    return train


def write_safetensors(folder: Path, weights: dict[str, Tensor], state: State | None = None) -> None:
    """Write model.safetensors and, given a state, optim.safetensors; equal input, equal bytes."""
    save_tensors(weights, folder / "model.safetensors")
    if state is None:
        return
    parts = {
        f"{part}/{name}": tensor
        for name, values in sorted(state.items())
        for part, tensor in sorted(values.items())
    }
    save_tensors(parts, folder / "optim.safetensors")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors sorted by name, with the file mode of the umask."""
    from safetensors.torch import save_file

    ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    # One metadata entry only: safetensors writes several in no fixed order.
    save_file(ordered, path, metadata={"format": "pt"})
    os.umask(mask := os.umask(0o077))  # the umask can only be read by setting it
    path.chmod(0o666 & ~mask)  # safetensors creates it with 0600
