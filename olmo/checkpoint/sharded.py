"""Sharded checkpoints, `step{N}`, by torch's distributed checkpoint (DCP): each process writes its
part, the first one the index of the parts.

    <save_folder>/step40/  config.yaml  model_and_optim/{.metadata, __0_0.distcp, …}  train/rank0.pt

The index is a pickle, and so could hold code. It is read with a list of the few names that belong
there, and tensors and settings are read as data only.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from olmo.checkpoint import layout
from olmo.checkpoint.optim_state import State, by_name, clean

FOLDER = "model_and_optim"
EPHEMERAL = "ephemeral"  # an empty file in a checkpoint that the next one replaces

_MODULE = "torch.distributed.checkpoint"
_ALLOWED = {
    *((f"{_MODULE}.metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_MODULE}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
}  # fmt: skip


def save_sharded(
    save_folder: str | Path,
    step: int,
    *,
    config_yaml: str,
    model: Mapping[str, Any],
    optim: Mapping[str, Any],
    train: Mapping[str, Any],
    first: bool = True,
    group: dist.ProcessGroup | None = None,
    wait: Callable[[], None] = lambda: None,
    keep: int = -1,
    ephemeral: bool = False,
) -> Path:
    """Write <save_folder>/step{N}, whole or not at all. All processes call it together.

    `model` and `optim` (an optimizer's state_dict) hold tensors or DTensors; `group` is the
    processes' (None: one process), `wait` their barrier, `first` whether this is the one that
    does what one does for all.
    """
    folder = Path(save_folder) / layout.folder_name(step, unsharded=False)
    place = contextlib.nullcontext(layout.partial_name(folder))
    state, groups = by_name(dict(optim))
    flat = {f"model.{name}": tensor for name, tensor in model.items()}
    for name, kept in state.items():
        flat |= {f"optim.state.{name}.{part}": value for part, value in kept.items()}
    with layout.writing(folder) if first else place as partial:
        wait()  # until the folder is there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process is one
            writer = FileSystemWriter(partial / FOLDER)
            dcp_save(flat, storage_writer=writer, process_group=group, no_dist=group is None)
        if first:
            (partial / "config.yaml").write_text(config_yaml)
            (partial / "train").mkdir()
            torch.save({**train, "optimizer": groups}, partial / "train" / "rank0.pt")
            if ephemeral:
                (partial / EPHEMERAL).touch()
    if first:
        layout.link_latest(folder)
        _retain(Path(save_folder), folder, keep, ephemeral)
    return folder


def _retain(save_folder: Path, newest: Path, keep: int, ephemeral: bool) -> None:
    """Of ephemeral ones only the newest stays, and none once a lasting one came."""
    for path in layout.checkpoints(save_folder, unsharded=False):
        if path != newest and (path / EPHEMERAL).exists():
            layout.remove(path)
    if not ephemeral:
        layout.retain(save_folder, keep, unsharded=False)


def is_sharded(folder: Path) -> bool:
    return (folder / FOLDER / ".metadata").exists()


def read_sharded(
    folder: Path, optimizer: bool
) -> tuple[dict[str, torch.Tensor], tuple[State, list[dict[str, Any]]] | None]:
    """Weights by name and the optimizer's state by name, whole, whoever wrote them."""
    reader = _Reader(folder / FOLDER)
    index = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {}
    for key, kind in index.items():
        if key.startswith("model.") or (optimizer and key.startswith("optim.")):
            tensor = isinstance(kind, TensorStorageMetadata)
            wanted[key] = torch.empty(kind.size, dtype=kind.properties.dtype) if tensor else None  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_load(wanted, storage_reader=reader, planner=_Planner(False), no_dist=True)
    model = {k.removeprefix("model."): v for k, v in wanted.items() if k.startswith("model.")}
    if not optimizer:
        return model, None
    state: State = {}
    for key, value in wanted.items():
        if key.startswith("optim.state."):
            name, _, part = key.removeprefix("optim.state.").rpartition(".")
            state.setdefault(clean(name), {})[part] = value
    train = torch.load(folder / "train" / "rank0.pt", weights_only=True, map_location="cpu")
    groups = train.get("optimizer") or [{"param_names": sorted(state)}]
    return model, (state, groups)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"the checkpoint's index asks for {module}.{name}, which is not run")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
