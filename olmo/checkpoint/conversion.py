"""One kind of checkpoint to another: sharded, unsharded, safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olmo.checkpoint.final import write_safetensors
from olmo.checkpoint.optim_state import State
from olmo.checkpoint.read import load
from olmo.checkpoint.save import save_unsharded

KINDS = ("unsharded", "sharded", "safetensors")


def convert(source: str | Path, into: str | Path, kind: str) -> Path:
    """Read any checkpoint folder and write it as `kind`; the folder that was written.

    Sharded and unsharded ones are written as `into`/step{N} and `into`/step{N}-unsharded,
    safetensors (model, optim, train.json, config.yaml) into `into` itself. Written sharded, it is
    one shard: a run that loads it spreads it as it needs.

    Raises ValueError for another kind, and for a checkpoint that lacks a part.
    """
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}, found {kind!r}")
    source, into = Path(source), Path(into)
    checkpoint = load(source)
    assert checkpoint.optim is not None and checkpoint.train is not None
    config_yaml = (source / "config.yaml").read_text()
    if kind == "safetensors":
        into.mkdir(parents=True, exist_ok=True)
        (into / "config.yaml").write_text(config_yaml)
        write_safetensors(into, checkpoint.model, checkpoint.optim[0])
        train = {**checkpoint.train, "optimizer": checkpoint.optim[1]}
        (into / "train.json").write_text(json.dumps(train, indent=1, sort_keys=True) + "\n")
        return into
    train = {k: v for k, v in checkpoint.train.items() if k != "optimizer"}
    parts: dict[str, Any] = {
        "config_yaml": config_yaml,
        "model": checkpoint.model,
        "optim": _numbered(*checkpoint.optim),
        "train": train,
    }
    step = int(train["global_step"])
    into.mkdir(parents=True, exist_ok=True)
    if kind == "unsharded":
        return save_unsharded(into, step, **parts)
    from olmo.checkpoint.sharded import save_sharded

    return save_sharded(into, step, **parts)


def _numbered(state: State, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """torch's form: parameters numbered in the order of the groups."""
    numbers: dict[str, int] = {}
    new_groups = []
    for group in groups:
        names = group["param_names"]
        numbers |= {name: len(numbers) + i for i, name in enumerate(names)}
        new_groups.append({**group, "params": [numbers[name] for name in names]})
    return {
        "state": {numbers[name]: kept for name, kept in state.items()},
        "param_groups": new_groups,
    }
