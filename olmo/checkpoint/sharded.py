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

from olmo.checkpoint import layout, plain
from olmo.checkpoint.optim_state import State, by_name
from olmo.checkpoint.plain import Part
from olmo.io import foreign
from olmo.model.regroup import plain_name

FOLDER = "model_and_optim"
TRAIN = "train/rank0.pt"

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
    """Write <save_folder>/step{N}, whole or not at all. All processes call it together.

    `model` and `optim` (an optimizer's state_dict) hold tensors or DTensors; `group` is the
    processes' (None: one process), `wait` their barrier, `first` whether this is the one that
    does what one does for all. `keep` newest folders stay, -1 for all; None leaves that to
    `retain`.
    """
    folder = Path(save_folder) / layout.folder_name(step, unsharded=False)
    place = contextlib.nullcontext(layout.partial_name(folder))
    state, groups = by_name(dict(optim))
    flat = {f"model.{name}": tensor for name, tensor in model.items()}
    for name, kept in state.items():
        flat |= {f"optim.state.{name}.{part}": value for part, value in kept.items()}
    with layout.writing(folder) if first else place as partial:
        wait()  # until the folder is there
        with _as_it_was(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process is one
            writer = _Writer(partial / FOLDER)
            dcp_save(flat, storage_writer=writer, process_group=group, no_dist=group is None)
        if first:
            (partial / "config.yaml").write_text(config_yaml)
            (partial / "train").mkdir()
            plain.write({**train, "optimizer": groups}, partial / TRAIN)
            if ephemeral:
                (partial / layout.EPHEMERAL).touch()
    if first:
        layout.link_latest(folder)
        if keep is not None:
            retain(folder, keep)
    return folder


def retain(newest: Path, keep: int) -> None:
    """As `layout.retain`; ephemeral ones go once a newer one came, ephemeral or lasting."""
    for path in layout.checkpoints(newest.parent, unsharded=False):
        if layout.age(path) < layout.age(newest) and (path / layout.EPHEMERAL).exists():
            layout.remove(path)
    if not (newest / layout.EPHEMERAL).exists():
        layout.retain(newest, keep)


class Sharded:
    """What a sharded folder holds, whoever wrote it. Reads what it is asked for.

    `model` and `state` have a Part for each tensor, by parameter name; `state` also has the
    numbers among what the optimizer keeps.
    """

    def __init__(self, folder: Path, optimizer: bool) -> None:
        self._folder = folder / FOLDER
        index = _index(self._folder / ".metadata").state_dict_metadata
        self.model: dict[str, Part] = {}
        self.state: State = {}
        numbers = []
        for key, kind in index.items():
            of, _, name = key.partition(".")
            part = None
            if isinstance(kind, TensorStorageMetadata):
                part = Part(key, kind.size, kind.properties.dtype)
            if of == "model" and part is not None:
                self.model[plain_name(name)] = part
            elif of == "optim" and name.startswith("state.") and optimizer:
                name, _, what = name.removeprefix("state.").rpartition(".")
                self.state.setdefault(plain_name(name), {})[what] = part
                if part is None:
                    numbers.append((plain_name(name), what, key))
        found: dict[str, Any] = {key: None for _, _, key in numbers}
        self.read(found)
        for name, what, key in numbers:
            self.state[name][what] = found[key]

    def read(self, wanted: dict[str, Any]) -> None:
        """Fill the tensors of `wanted`, by key; of a DTensor what this process has of it.

        Raises ValueError for what is broken.
        """
        if not wanted:
            return
        with _as_it_was(f"cannot read {self._folder}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader, planner = _Reader(self._folder), _Planner(flatten_state_dict=False)
            dcp_load(wanted, storage_reader=reader, planner=planner, no_dist=True)


def files_of(index: Path) -> list[str]:
    """The files that a sharded checkpoint's index (.metadata) names, beside itself."""
    return sorted({info.relative_path for info in _index(index).storage_data.values()})


def _index(path: Path) -> Metadata:
    try:
        found: Metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        for info in found.storage_data.values():
            foreign.part(info.relative_path, str(path))
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return found


@contextlib.contextmanager
def _as_it_was(said: str | None = None) -> Iterator[None]:
    """torch collects what went wrong on all processes; one of these is raised.

    As ValueError that begins with `said`, if that is given.
    """
    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        if said is None:
            raise failure from None
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise ValueError(f"{said}: {reason}") from failure


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"the checkpoint's index asks for {module}.{name}, which is not run")
        return super().find_class(module, name)


class _Writer(FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with plain.disk_errors():
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
