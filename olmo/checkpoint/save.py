"""Saves unsharded checkpoints in OLMo's layout, `step{N}-unsharded`, which OLMo's tools load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo.checkpoint import layout
from olmo.checkpoint.torch_files import save_torch_file


def save_unsharded(
    save_folder: str | Path,
    step: int,
    *,
    config_yaml: str,
    model: Mapping[str, Any],
    optim: Mapping[str, Any] | None,
    train: Mapping[str, Any],
    keep: int | None = -1,
) -> Path:
    """Write <save_folder>/step{N}-unsharded atomically, and link it as the latest.

    `model`, `optim` and `train` hold tensors, numbers, text and containers of those, nothing
    else, so that they load without running code. The `keep` newest folders stay, -1 for all; with
    None the caller calls `layout.keep_newest`.
    """

    folder = Path(save_folder) / layout.folder_name(step, unsharded=True)
    with layout.atomic_checkpoint(folder) as partial:
        (partial / "config.yaml").write_text(config_yaml)
        save_torch_file(dict(model), partial / "model.pt")
        if optim is not None:
            save_torch_file(dict(optim), partial / "optim.pt")
        save_torch_file(dict(train), partial / "train.pt")
    layout.link_latest(folder)
    if keep is not None:
        layout.keep_newest(folder, keep)
    return folder
