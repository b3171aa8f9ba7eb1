"""Model soups: a checkpoint whose weights are the mean of those of several runs.

Wortsman et al. 2022 (arXiv:2203.05482). OLMo 2 (arXiv:2501.00656) averages runs that anneal the
same checkpoint on other orders of the same data.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from olmo.config import ModelConfig
from olmo.store.stage import Facts, Folder, Input, Inputs, Unhashed, stage


def soup(checkpoints: list[Path], final: Path) -> None:
    """Average the weights of final checkpoints, with equal weights.

    Args:
        checkpoints: folders of final checkpoints
    """
    if len(checkpoints) < 2:
        raise ValueError(f"expected at least two checkpoints to average, found {len(checkpoints)}")
    averaged(
        weights=[folder / "model.safetensors" for folder in checkpoints],
        config=checkpoints[0] / "config.yaml",
        final=final,
        checkpoints=checkpoints,
    )


@stage(version=1)
def averaged(
    weights: Inputs, config: Input, final: Folder, checkpoints: Unhashed[list[Path]]
) -> Facts:
    """The uniform mean of several models' weights, summed in float64, stored in their own dtype.

    `final` gets model.safetensors and the config.yaml of the first checkpoint, and no optimizer
    state. `checkpoints` are the folders, for error messages.

    Raises:
        ValueError: the checkpoints have different model configs or shapes.
    """
    from olmo.checkpoint.final import write_safetensors
    from olmo.checkpoint.read import open_checkpoint

    first, *others = checkpoints
    model = ModelConfig.load(config, key="model", untrusted=True)
    one = open_checkpoint(weights[0], optimizer=False, trainer=False).model
    sums = {name: tensor.double() for name, tensor in one.items()}
    for folder, file in zip(others, weights[1:], strict=True):
        other = ModelConfig.load(folder / "config.yaml", key="model", untrusted=True)
        found = open_checkpoint(file, optimizer=False, trainer=False).model
        if other != model or tensor_shapes(found) != tensor_shapes(one):
            raise ValueError(
                f"expected checkpoints of one model, found different ones in {first} and {folder}"
            )
        for name, tensor in found.items():
            sums[name] += tensor.double()
    final.mkdir(parents=True)
    mean = {name: (total / len(weights)).to(one[name].dtype) for name, total in sums.items()}
    write_safetensors(final, mean)
    shutil.copyfile(config, final / "config.yaml")
    return {"checkpoints": len(weights), "parameters": sum(t.numel() for t in mean.values())}


def tensor_shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter name → shape."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
