"""Saves a run while it trains: which kind at which step, in the background, and to a bucket."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmo.checkpoint import layout
from olmo.checkpoint.save import save_unsharded
from olmo.config import DistributedStrategy, TrainConfig, to_yaml
from olmo.distributed.parallelize import is_fsdp
from olmo.distributed.world import World
from olmo.runtime.log import log
from olmo.train.state import TrainState, every


class FailedElsewhere(OSError):
    """Another process could not save; its own error says why."""


class Saver:
    """Saves a run at the intervals of its config and at its end.

    Training waits only until the state is copied to the host. One thread writes the copy, another
    uploads it to remote_save_folder. A save never waits for an upload, which may take longer than
    the time limit leaves, or than other processes wait in a collective.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
    ) -> None:
        self._cfg, self._world, self._folder = cfg, world, Path(cfg.save_folder).absolute()
        self._model, self._optimizer, self._state = model, optimizer, state
        self.saved: Path | None = None  # the newest
        self._is_ephemeral = False  # that one: a later save removes it
        self._sharded = is_fsdp(cfg, world)
        self._unsharded_interval = cfg.save_interval_unsharded  # that many steps an unsharded one
        single = cfg.distributed_strategy == DistributedStrategy.single
        if (
            single
            and self._unsharded_interval is None
            and cfg.save_num_unsharded_checkpoints_to_keep
        ):
            self._unsharded_interval = cfg.save_interval  # as in OLMo: there is nothing to shard
        # A group for the writer threads, whose collectives must not mix with training's.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[Path | None] | None = None
        # Uploads run in daemon threads, since a process that has paused does not wait for them.
        self._has_remote = cfg.remote_save_folder is not None and not cfg.dry_run
        self._upload: threading.Thread | None = None
        self._upload_error: Exception | None = None

    def resume(self, saved: Path) -> None:
        """Resume from a checkpoint of this run; uploads what the last start did not."""
        self.saved, self._is_ephemeral = saved, (saved / layout.EPHEMERAL).exists()
        self._begin_upload()

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed on this process."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def due(self, step: int) -> str | None:
        """The kind to save at this step: unsharded, sharded, ephemeral, or None."""
        if self._writing is not None and self._writing.done() and not self.failed:
            self._join()
        cfg = self._cfg
        if every(step, self._unsharded_interval):
            return "unsharded" if cfg.save_num_unsharded_checkpoints_to_keep else None
        if every(step, cfg.save_interval):
            return "sharded" if cfg.save_num_checkpoints_to_keep else None
        return "ephemeral" if every(step, cfg.save_interval_ephemeral) else None

    def pause(self) -> Path:
        """Begin to save, unless this step is saved already, in any kind; the folder."""
        self._join()
        if self.saved is not None and layout.parse_step(self.saved) == self._state.global_step:
            return self.saved
        return self.save()

    def save(self, kind: str | None = None) -> Path:
        """Begin to save, unless this step is saved already in that kind; the folder.

        Args:
            kind: unsharded, sharded or ephemeral. None: as at the run's end, unsharded where every
                process holds the whole model or the config asks for unsharded ones, else sharded.
        """
        self._join()
        step = self._state.global_step
        wants_unsharded = self._unsharded_interval is not None
        must_be_unsharded = kind == "unsharded" or (kind is None and wants_unsharded)
        if self._is_saved(must_be_unsharded):
            assert self.saved is not None
            return self.saved
        kind = kind or ("unsharded" if wants_unsharded or not self._sharded else "sharded")
        folder = self._folder / layout.folder_name(step, unsharded=kind == "unsharded")
        shared: dict[str, Any] = {
            "config_yaml": to_yaml(self._cfg.asdict_for_saving()),
            "train": self._state.state_dict(self._world.size),
        }
        model, optim = dict(self._model.state_dict()), self._optimizer.state_dict()
        retire: Callable[[Path], object]
        if kind == "unsharded":
            # Every process takes part in gathering the shards; rank 0 writes.
            model, optim = _copy_to_host(model, whole=True), _copy_to_host(optim, whole=True)
            if self._world.is_rank0:
                keep = self._cfg.save_num_unsharded_checkpoints_to_keep or 1
                shared |= {"model": model, "optim": optim, "keep": None}
                write = partial(save_unsharded, self._folder, step, **shared)
                retire = partial(layout.keep_newest, keep=keep)
                self._writing = self._thread.submit(self._write, write, retire)
        else:
            from olmo.checkpoint.sharded import keep_newest_sharded, save_sharded

            group = self._group
            write = partial(
                save_sharded,
                self._folder,
                step,
                model=_copy_to_host(model, whole=False),
                optim=_copy_to_host(optim, whole=False),
                first=self._world.is_rank0,
                group=group,
                wait=lambda: dist.barrier(group=group) if group is not None else None,
                keep=None,
                ephemeral=kind == "ephemeral",
                **shared,
            )
            retire = partial(keep_newest_sharded, keep=self._cfg.save_num_checkpoints_to_keep or 1)
            self._writing = self._thread.submit(self._write, write, retire)
        self.saved, self._is_ephemeral = folder, kind == "ephemeral"
        return folder

    def _is_saved(self, unsharded: bool) -> bool:
        """Whether the newest is of this step and permanent, and unsharded if it must be."""
        saved = self.saved
        if (
            saved is None
            or self._is_ephemeral
            or layout.parse_step(saved) != self._state.global_step
        ):
            return False
        return layout.is_unsharded(saved) or not unsharded

    def finish(self) -> None:
        """Wait for the save in progress; raises its error."""
        self._join()

    def finish_upload(self, timeout_s: float = math.inf, required: bool = True) -> None:
        """Wait until every checkpoint is in remote_save_folder.

        All processes call it, and agree every second whether to continue: in one long collective
        the others would time out while rank 0 uploads.

        Args:
            timeout_s: after that the next start uploads the rest.
            required: raise the error that stopped an upload.
        """
        if not self._has_remote:
            return
        end = time.monotonic() + timeout_s
        while self._world.any(self._is_uploading() and time.monotonic() < end):
            if self._upload is not None:
                self._upload.join(max(min(1.0, end - time.monotonic()), 0))
        if required and self._upload_error is not None:
            raise self._upload_error
        if self._is_uploading():
            log.info(f"not uploaded to {self._cfg.remote_save_folder} yet: the next start does it")

    def give_up(self) -> NoReturn:
        """End the run: raises this process's own error of saving, else FailedElsewhere."""
        self._join()
        raise FailedElsewhere(
            "another process could not save the checkpoint and says why; this process stops"
        )

    def _join(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            if (folder := writing.result()) is not None:
                log.info(f"saved {folder}")

    def _write(self, write: Callable[[], Path], retire: Callable[[Path], object]) -> Path:
        """In the thread: write, then remove what that replaces, once it is uploaded too."""
        folder = write()
        if self._has_remote:
            self._begin_upload(partial(retire, folder))
        elif self._world.is_rank0:
            retire(folder)
        return folder

    def _begin_upload(self, then: Callable[[], object] = lambda: None) -> None:
        if self._has_remote and self._world.is_rank0:
            self._upload = threading.Thread(
                target=self._mirror, args=(self._upload, then), daemon=True, name="upload"
            )
            self._upload.start()

    def _is_uploading(self) -> bool:
        return self._upload is not None and self._upload.is_alive()

    def _mirror(self, previous: threading.Thread | None, then: Callable[[], object]) -> None:
        """In a thread of its own, after the previous one: upload every whole checkpoint.

        After a failure the next save tries again; at the end it is an error.
        """
        from olmo.checkpoint.mirror import mirror_checkpoints

        if previous is not None:
            previous.join()
        try:
            mirror_checkpoints(self._folder, str(self._cfg.remote_save_folder))
            self._upload_error = None
        except Exception as error:  # an exception that ends a thread is lost
            log.warning(f"not uploaded yet: {error}")
            self._upload_error = error
        then()


def _copy_to_host(value: Any, whole: bool) -> Any:
    """Tensors copied to the host, DTensors gathered if `whole`, in containers of the same kind."""
    if hasattr(value, "full_tensor"):
        return _gather(value) if whole else _copy_shard(value)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _copy_to_host(v, whole) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_to_host(v, whole) for v in value)
    return value


def _gather(value: Any) -> Tensor:
    gathered = value.full_tensor()
    # Where one process holds all of it (HSDP with shards of one process), full_tensor() returns the
    # parameter itself, which training changes next.
    is_own = gathered.data_ptr() == value.to_local().data_ptr()
    return gathered.detach().to("cpu", copy=is_own)


def _copy_shard(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    local = value.to_local().detach().to("cpu", copy=True)
    mesh, shape, stride = value.device_mesh, value.shape, value.stride()
    return DTensor.from_local(
        local, mesh, value.placements, run_check=False, shape=shape, stride=stride
    )
