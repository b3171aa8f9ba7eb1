"""Loads checkpoints: OLMo's unsharded and sharded folders, and the pipeline's final ones.

No pickled code runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olmo.checkpoint import layout
from olmo.checkpoint.optim_state import State, distribute_like, load_named_state, to_named_state
from olmo.checkpoint.pickled_keys import decode_state, is_encoded_key
from olmo.checkpoint.torch_files import StoredTensor, load_torch_file
from olmo.config import ModelConfig
from olmo.model.regroup import regroup_state_dict, strip_wrappers
from olmo.runtime.log import log
from olmo.runtime.numbers import from_json

if TYPE_CHECKING:
    from olmo.checkpoint.sharded import ShardedReader
    from olmo.model import OLMo


@dataclass
class Checkpoint:
    """The content of a checkpoint. A sharded one has StoredTensors until they are read."""

    folder: Path
    model: dict[str, Any]  # by parameter name
    optim: tuple[State, list[dict[str, Any]]] | None  # state by parameter name, groups
    train: dict[str, Any] | None  # the trainer's state: global_step, epoch, …
    sharded: ShardedReader | None = None

    def fill(self, pairs: Iterable[tuple[Tensor, Any]]) -> None:
        """Copy into the first tensor of each pair the stored second; a DTensor takes its shard."""
        targets_by_key: dict[str, list[Tensor]] = {}
        for target, stored in pairs:
            if isinstance(stored, StoredTensor):
                targets_by_key.setdefault(stored.key, []).append(target)
            else:
                target.copy_(distribute_like(stored, target))
        if self.sharded is not None:
            self.sharded.read({key: targets[0] for key, targets in targets_by_key.items()})
        for first, *others in targets_by_key.values():
            for other in others:
                other.copy_(first)

    def materialize(self) -> Checkpoint:
        """The same with every tensor read into this process's memory."""
        if self.sharded is None:
            return self
        pairs: list[tuple[Tensor, StoredTensor]] = []

        def allocate(stored: Any) -> Any:
            if not isinstance(stored, StoredTensor):
                return stored
            pairs.append((torch.empty(stored.shape, dtype=stored.dtype), stored))
            return pairs[-1][0]

        model = {name: allocate(stored) for name, stored in self.model.items()}
        optim = self.optim
        if optim is not None:
            state, groups = optim
            optim = (
                {name: {k: allocate(v) for k, v in parts.items()} for name, parts in state.items()},
                groups,
            )
        self.fill(pairs)
        return replace(self, model=model, optim=optim, sharded=None)


def find_newest(save_folder: str | Path) -> Path | None:
    """The newest valid checkpoint of a run; a broken one is skipped with a warning."""
    layout.restore_replaced(Path(save_folder))
    for folder in reversed(layout.list_checkpoints(save_folder)):
        try:
            layout.verify_checkpoint(folder)
        except ValueError as error:
            log.warning(f"skipping a broken checkpoint: {error}")
            continue
        return folder
    return None


def load_checkpoint(folder: str | Path, optimizer: bool = True, trainer: bool = True) -> Checkpoint:
    """Verify a checkpoint folder and read it, with optimizer and trainer state or without.

    Raises FileNotFoundError if it does not exist, ValueError if it is broken or of another layout.
    """
    folder = Path(folder)
    layout.verify_checkpoint(folder)
    return open_checkpoint(folder, optimizer, trainer, mapped=False).materialize()


def open_checkpoint(
    folder: Path, optimizer: bool = True, trainer: bool = True, mapped: bool = True
) -> Checkpoint:
    """Open a verified checkpoint for load_weights and load_optimizer_state.

    Those read only what this process needs: a sharded folder gives StoredTensors, an unsharded one
    memory-mapped tensors (`mapped`). `folder` may be a safetensors file of weights alone.
    """
    if folder.is_file():
        if optimizer or trainer:
            raise ValueError(
                f"{folder} is a file of weights alone; start a new run from it: "
                "--reset_optimizer_state --reset_trainer_state"
            )
        model = _safetensors(folder)
        return Checkpoint(
            folder, {strip_wrappers(name): t for name, t in model.items()}, None, None
        )
    if (folder / "model_and_optim").is_dir():
        return _sharded(folder, optimizer, trainer)
    if (folder / "model.safetensors").exists():
        model = _safetensors(folder / "model.safetensors")
    elif (folder / "model.pt").exists():
        model = load_torch_file(folder / "model.pt", mapped)
    else:
        raise ValueError(
            f"{folder} contains none of model.pt, model.safetensors, model_and_optim/; expected a "
            "checkpoint (step{N}-unsharded, or step{N} of torch's distributed checkpoint) or a "
            "final one. Convert OLMo's older sharded layouts with its scripts/unshard.py"
        )
    return Checkpoint(
        folder,
        {strip_wrappers(name): tensor for name, tensor in model.items()},
        _optimizer(folder, mapped) if optimizer else None,
        _trainer(folder) if trainer else None,
    )


def _sharded(folder: Path, optimizer: bool, trainer: bool) -> Checkpoint:
    from olmo.checkpoint.sharded import STATE_FOLDER, TRAIN_FILE, ShardedReader

    if not (folder / STATE_FOLDER / ".metadata").exists():
        raise ValueError(
            f"{folder}/{STATE_FOLDER} has no .metadata: torch's distributed checkpoint did not "
            "write it, or did not finish. Convert OLMo's other sharded layouts with its "
            "scripts/unshard.py"
        )
    sharded = ShardedReader(folder, optimizer)
    train = load_torch_file(folder / TRAIN_FILE) if optimizer or trainer else {}
    groups = train.get("optimizer") or [{"param_names": sorted(sharded.state)}]
    return Checkpoint(
        folder,
        dict(sharded.model),
        (sharded.state, groups) if optimizer else None,
        train if trainer else None,
        sharded,
    )


def _optimizer(folder: Path, mapped: bool) -> tuple[State, list[dict[str, Any]]]:
    if (folder / "optim.safetensors").exists():
        stored = _safetensors(folder / "optim.safetensors")
        if "param_groups" in stored:
            return to_named_state(stored)
        state: State = {}
        for key, tensor in stored.items():
            part, _, name = key.partition("/")
            state.setdefault(name, {})[part] = tensor
        return state, from_json((folder / "train.json").read_text())["optimizer"]
    if (folder / "optim.pt").exists():
        return to_named_state(load_torch_file(folder / "optim.pt", mapped))
    raise ValueError(
        f"{folder} has no optimizer state; start from its weights alone: --reset_optimizer_state"
    )


def _trainer(folder: Path) -> dict[str, Any]:
    if (folder / "train.json").exists():
        return from_json((folder / "train.json").read_text())
    for name in ("train.pt", "other.pt"):
        if (folder / name).exists():
            return load_torch_file(folder / name)
    raise ValueError(
        f"{folder} has no trainer state; start a new run from it: --reset_trainer_state"
    )


def _safetensors(path: Path) -> dict[str, Any]:
    """Tensors by name; for OLMo's own files the nested dictionary that they encode."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs safetensors: `uv pip install safetensors`"
        ) from error
    try:
        tensors = load_file(path)
        return decode_state(tensors) if all(map(is_encoded_key, tensors)) else tensors
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> OLMo:
    """The model of a checkpoint, a folder or a URL, in evaluation mode."""
    if "://" in str(folder):
        from olmo.checkpoint.mirror import download_checkpoint

        with TemporaryDirectory() as place:
            local = download_checkpoint(str(folder), Path(place), optimizer=False, trainer=False)
            return load_model(local, device)
    from olmo.model import OLMo

    folder = Path(folder)
    checkpoint = load_checkpoint(folder, optimizer=False, trainer=False)
    config = ModelConfig.load(folder / "config.yaml", key="model", untrusted=True)
    model = OLMo(config.update_with(init_device="cpu"), init_params=False)
    load_weights(model, checkpoint)
    return model.to(device).eval()


def load_weights(model: OLMo, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model. Raises ValueError for one that does not fit."""
    weights, _ = model._make_state_dict_compatible(checkpoint.model)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise ValueError(f"{checkpoint.folder} has no weight {name}: it is another model's")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{checkpoint.folder}: {name} is {tuple(weights[name].shape)}, the config's model "
                f"has {tuple(tensor.shape)}; take the model section of the checkpoint's config.yaml"
            )
    if extra := sorted(set(weights) - set(own)):
        raise ValueError(
            f"{checkpoint.folder} has a weight {extra[0]} that the config's model does not have"
        )
    checkpoint.fill((tensor, weights[name]) for name, tensor in own.items())


def load_optimizer_state(
    model: OLMo, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Copy a checkpoint's state into an optimizer. Raises ValueError if it does not fit."""
    assert checkpoint.optim is not None
    size = model.config.block_group_size
    state, _ = regroup_state_dict(checkpoint.optim[0], size)
    groups = [
        {
            **group,
            "param_names": list(regroup_state_dict(dict.fromkeys(group["param_names"]), size)[0]),
        }
        for group in checkpoint.optim[1]
    ]
    pairs: list[tuple[Tensor, Any]] = []

    def allocate_like(stored: Any, parameter: Tensor) -> Any:
        if not isinstance(stored, StoredTensor | Tensor):
            return stored
        like = parameter if stored.shape == parameter.shape else torch.empty(stored.shape)
        pairs.append((torch.empty_like(like, dtype=stored.dtype), stored))
        return pairs[-1][0]

    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in state:
                state[name] = {k: allocate_like(v, parameter) for k, v in state[name].items()}

    checkpoint.fill(pairs)
    load_named_state(optimizer, state, groups)
