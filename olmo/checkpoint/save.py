"""Saving in OLMo's layout: `step{N}-unsharded`, which OLMo's own tools load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo.checkpoint import layout, plain


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
    """Write <save_folder>/step{N}-unsharded, whole or not at all, and link it as the latest.

    `model`, `optim` and `train` hold tensors, numbers, text and containers of those, nothing
    else, so that they load without running code. `keep` newest folders stay, -1 for all; None
    leaves that to `layout.retain`.
    """
    folder = Path(save_folder) / layout.folder_name(step, unsharded=True)
    with layout.writing(folder) as partial:
        (partial / "config.yaml").write_text(config_yaml)
        plain.write(dict(model), partial / "model.pt")
        if optim is not None:
            plain.write(dict(optim), partial / "optim.pt")
        plain.write(dict(train), partial / "train.pt")
    layout.link_latest(folder)
    if keep is not None:
        layout.retain(folder, keep)
    return folder
