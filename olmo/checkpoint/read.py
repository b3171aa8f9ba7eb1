"""Loading: OLMo's unsharded folders and the pipeline's final ones. No pickled code ever runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olmo.checkpoint import layout
from olmo.checkpoint.encoded import decode, is_encoded
from olmo.checkpoint.optim_state import State, by_name, clean
from olmo.config import ModelConfig
from olmo.log import warn

if TYPE_CHECKING:
    from olmo.model import OLMo


@dataclass
class Checkpoint:
    folder: Path
    model: dict[str, Tensor]  # by parameter name
    optim: tuple[State, list[dict[str, Any]]] | None  # state by parameter name, groups
    train: dict[str, Any] | None  # where the run was: global_step, epoch, …


def fetched(url: str, into: Path, optimizer: bool = True, trainer: bool = True) -> Path:
    """The unsharded checkpoint at a URL (http, s3, r2, gs, hf), downloaded to a folder in `into`.

    What is there already is not fetched again. Raises ValueError, one line, for what cannot be had.
    """
    from olmo.io import fetch

    url = url.rstrip("/")
    folder = into / url.rsplit("/", 1)[-1]
    kinds = [("config.yaml",), ("model.pt", "model.safetensors")]
    kinds += [("optim.pt", "optim.safetensors")] if optimizer else []
    kinds += [("train.pt", "other.pt")] if trainer else []
    folder.mkdir(parents=True, exist_ok=True)
    for names in kinds:
        refusals = []
        for name in names:
            if (folder / name).exists():
                break
            try:
                fetch(f"{url}/{name}", folder / name, folder / f".{name}.part")
                break
            except ValueError as error:
                refusals.append(str(error))
        else:
            raise ValueError(
                f"cannot load {url}: {'; '.join(refusals)}. Expected an unsharded checkpoint "
                "(step{N}-unsharded) there"
            )
    return folder


def newest(save_folder: str | Path) -> Path | None:
    """The newest checkpoint that is whole; a broken one is passed over, loudly."""
    for folder in reversed(layout.checkpoints(save_folder)):
        try:
            layout.verify(folder)
        except ValueError as error:
            warn(f"passing over a broken checkpoint: {error}")
            continue
        return folder
    return None


def load(folder: str | Path, optimizer: bool = True, trainer: bool = True) -> Checkpoint:
    """Read and verify a checkpoint folder; `optimizer` and `trainer` say whether theirs too.

    Raises FileNotFoundError for no checkpoint, ValueError for a broken or an unknown one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}; mend --load_path")
    layout.verify(folder)
    if (folder / "model_and_optim").is_dir():
        from olmo.checkpoint.sharded import read_sharded

        weights, state = read_sharded(folder, optimizer)
        return Checkpoint(
            folder,
            {clean(name): tensor for name, tensor in weights.items()},
            state,
            _torch(folder / "train" / "rank0.pt") if trainer else None,
        )
    if (folder / "model.safetensors").exists():
        model = _safetensors(folder / "model.safetensors")
    elif (folder / "model.pt").exists():
        model = _torch(folder / "model.pt")
    else:
        raise ValueError(
            f"{folder} holds none of model.pt, model.safetensors, model_and_optim/; expected a "
            "checkpoint (step{N}-unsharded, or step{N} of torch's distributed checkpoint) or a "
            "final one. OLMo's older sharded layouts are unsharded by its scripts/unshard.py"
        )
    return Checkpoint(
        folder,
        {clean(name): tensor for name, tensor in model.items()},
        _optimizer(folder) if optimizer else None,
        _trainer(folder) if trainer else None,
    )


def _optimizer(folder: Path) -> tuple[State, list[dict[str, Any]]]:
    if (folder / "optim.safetensors").exists():
        stored = _safetensors(folder / "optim.safetensors")
        if "param_groups" in stored:
            return by_name(stored)
        state: State = {}
        for key, tensor in stored.items():
            part, _, name = key.partition("/")
            state.setdefault(name, {})[part] = tensor
        return state, json.loads((folder / "train.json").read_text())["optimizer"]
    if (folder / "optim.pt").exists():
        return by_name(_torch(folder / "optim.pt"))
    raise ValueError(
        f"{folder} has no optimizer state; start from its weights alone: --reset_optimizer_state"
    )


def _trainer(folder: Path) -> dict[str, Any]:
    if (folder / "train.json").exists():
        return json.loads((folder / "train.json").read_text())
    for name in ("train.pt", "other.pt"):
        if (folder / name).exists():
            return _torch(folder / name)
    raise ValueError(
        f"{folder} has no trainer state; start a new run from it: --reset_trainer_state"
    )


def _torch(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error).lower() or "WeightsUnpickler" in str(error):
            reason = "it holds pickled code or objects besides tensors, which are never run"
        else:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"cannot read {path}: {reason}") from error


def _safetensors(path: Path) -> dict[str, Any]:
    """Tensors by name; nested, with settings beside them, where OLMo wrote the file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"reading {path} needs safetensors: `pip install safetensors`") from error
    try:
        tensors = load_file(path)
        return decode(tensors) if all(map(is_encoded, tensors)) else tensors
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> OLMo:
    """The model of a checkpoint folder, in evaluation mode."""
    from olmo.model import OLMo

    folder = Path(folder)
    checkpoint = load(folder, optimizer=False, trainer=False)
    config = ModelConfig.load(folder / "config.yaml", key="model", validate_paths=False)
    model = OLMo(config.update_with(init_device="cpu"), init_params=False)
    put_weights(model, checkpoint)
    return model.to(device).eval()


def put_weights(model: OLMo, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model; ValueError naming the first that does not fit."""
    weights, _ = model._make_state_dict_compatible(checkpoint.model)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise ValueError(f"{checkpoint.folder} has no weight {name}; it is another model's")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{checkpoint.folder}: {name} is {tuple(weights[name].shape)}, the config's model "
                f"has {tuple(tensor.shape)}; take the model section of the checkpoint's config.yaml"
            )
    if extra := sorted(set(weights) - set(own)):
        raise ValueError(
            f"{checkpoint.folder} has a weight {extra[0]} that the config's model has not"
        )
    model.load_state_dict(weights)
