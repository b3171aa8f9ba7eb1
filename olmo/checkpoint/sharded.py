"""Sharded checkpoints, `step{N}`, by torch's distributed checkpoint (DCP): each process writes its
shards, rank 0 also the index of all shards.

    <save_folder>/step40/  config.yaml  model_and_optim/{.metadata, __0_0.distcp, …}  train/rank0.pt

The index is a pickle, which may contain code. Its unpickler allows only the few names that belong
there; tensors and settings are read as data.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from olmo.checkpoint import layout
from olmo.checkpoint.optim_state import State, to_named_state
from olmo.checkpoint.torch_files import StoredTensor, reraise_disk_errors, save_torch_file
from olmo.io import untrusted
from olmo.model.regroup import strip_wrappers

STATE_FOLDER = "model_and_optim"
TRAIN_FILE = "train/rank0.pt"

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
    keep: int | None = -1,
    ephemeral: bool = False,
) -> Path:
    """Write <save_folder>/step{N} atomically. All processes call it together.

    `model` and `optim` (an optimizer's state_dict) hold tensors or DTensors. `group` is the process
    group (None: a single process), `wait` its barrier, and `first` is True on one process, which
    creates the folder and writes what is not sharded. The `keep` newest folders stay, -1 for all;
    with None the caller calls `keep_newest_sharded`.
    """
    folder = Path(save_folder) / layout.folder_name(step, unsharded=False)
    existing = contextlib.nullcontext(layout.partial_path(folder))
    state, groups = to_named_state(dict(optim))
    flat = {f"model.{name}": tensor for name, tensor in model.items()}
    for name, parts in state.items():
        flat |= {f"optim.state.{name}.{part}": value for part, value in parts.items()}
    with layout.atomic_checkpoint(folder) if first else existing as partial:
        wait()  # until the folder exists
        with _unwrap_dcp_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns that there is a single process
            writer = _Writer(partial / STATE_FOLDER)
            dcp_save(flat, storage_writer=writer, process_group=group, no_dist=group is None)
        if first:
            (partial / "config.yaml").write_text(config_yaml)
            (partial / "train").mkdir()
            save_torch_file({**train, "optimizer": groups}, partial / TRAIN_FILE)
            if ephemeral:
                (partial / layout.EPHEMERAL).touch()
    if first:
        layout.link_latest(folder)
        if keep is not None:
            keep_newest_sharded(folder, keep)
    return folder


def keep_newest_sharded(newest: Path, keep: int) -> None:
    """As `layout.keep_newest`, and removes ephemeral checkpoints older than `newest`."""
    for path in layout.list_checkpoints(newest.parent, unsharded=False):
        if layout.age_key(path) < layout.age_key(newest) and (path / layout.EPHEMERAL).exists():
            layout.remove_checkpoint(path)
    if not (newest / layout.EPHEMERAL).exists():
        layout.keep_newest(newest, keep)


class ShardedReader:
    """Reads chosen tensors of a sharded folder, ours or OLMo's.

    `model` and `state` have a StoredTensor for each tensor, by parameter name; `state` also has
    the optimizer's plain numbers.
    """

    def __init__(self, folder: Path, optimizer: bool) -> None:
        self._folder = folder / STATE_FOLDER
        index = _index(self._folder / ".metadata").state_dict_metadata
        self.model: dict[str, StoredTensor] = {}
        self.state: State = {}
        numbers = []
        for key, metadata in index.items():
            section, _, name = key.partition(".")
            tensor = None
            if isinstance(metadata, TensorStorageMetadata):
                tensor = StoredTensor(key, metadata.size, metadata.properties.dtype)
            if section == "model" and tensor is not None:
                self.model[strip_wrappers(name)] = tensor
            elif section == "optim" and name.startswith("state.") and optimizer:
                name, _, part = name.removeprefix("state.").rpartition(".")
                self.state.setdefault(strip_wrappers(name), {})[part] = tensor
                if tensor is None:
                    numbers.append((strip_wrappers(name), part, key))
        values: dict[str, Any] = {key: None for _, _, key in numbers}
        self.read(values)
        for name, part, key in numbers:
            self.state[name][part] = values[key]

    def read(self, targets: dict[str, Any]) -> None:
        """Fill the tensors of `targets`, by key; of a DTensor this process's shard.

        Raises ValueError for a broken checkpoint.
        """
        if not targets:
            return
        with _unwrap_dcp_errors(f"cannot read {self._folder}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader, planner = _Reader(self._folder), _Planner(flatten_state_dict=False)
            dcp_load(targets, storage_reader=reader, planner=planner, no_dist=True)


def list_shard_files(index: Path) -> list[str]:
    """The files that a sharded checkpoint's index (.metadata) names."""
    return sorted({info.relative_path for info in _index(index).storage_data.values()})


def _index(path: Path) -> Metadata:
    try:
        index: Metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        for info in index.storage_data.values():
            untrusted.check_part(info.relative_path, str(path))
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return index


@contextlib.contextmanager
def _unwrap_dcp_errors(prefix: str | None = None) -> Iterator[None]:
    """Raise the first of the errors that DCP collects from all processes.

    With `prefix`, as a ValueError whose message begins with it.
    """
    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        if prefix is None:
            raise failure from None
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise ValueError(f"{prefix}: {reason}") from failure


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(
                f"the checkpoint's index would import {module}.{name}, which is not allowed"
            )
        return super().find_class(module, name)


class _Writer(FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with reraise_disk_errors():
            return super().write_data(*args, **kwargs)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _index(Path(self.path) / ".metadata")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
