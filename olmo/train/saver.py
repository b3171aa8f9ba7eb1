"""When a run saves what, and from which objects."""

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
    """Another process ends the run, and says why."""


class Saver:
    """Saves a run at the intervals of its config and at its end.

    Training waits only for a copy of the state; a thread writes it while training goes on, and
    another sends it to remote_save_folder. No save waits for sending: that may take longer than
    there is time before a time limit, or than other processes wait for this one.
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
        self._passing = False  # whether that one is ephemeral, and so goes with a later save
        self._sharded = is_fsdp(cfg, world)
        self._unsharded_interval = cfg.save_interval_unsharded  # that many steps an unsharded one
        single = cfg.distributed_strategy == DistributedStrategy.single
        if (
            single
            and self._unsharded_interval is None
            and cfg.save_num_unsharded_checkpoints_to_keep
        ):
            self._unsharded_interval = cfg.save_interval  # as in OLMo: there is nothing to shard
        # The writers of all processes meet in a group of their own, apart from training's sums.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[Path | None] | None = None
        # What is being sent, and then what kept the last from being sent. Daemons, since a process
        # that has paused does not stay for them.
        self._mirrored = cfg.remote_save_folder is not None and not cfg.dry_run
        self._sending: threading.Thread | None = None
        self._unsent: Exception | None = None

    def resume(self, saved: Path) -> None:
        """Go on from a checkpoint of this run; what was not sent before is sent now."""
        self.saved, self._passing = saved, (saved / layout.EPHEMERAL).exists()
        self._begin_to_send()

    @property
    def failed(self) -> bool:
        """Whether this process knows that the save under way has gone wrong."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def due(self, step: int) -> str | None:
        """What is saved at this step: unsharded, sharded, ephemeral, or None."""
        if self._writing is not None and self._writing.done() and not self.failed:
            self._settle()
        cfg = self._cfg
        if every(step, self._unsharded_interval):
            return "unsharded" if cfg.save_num_unsharded_checkpoints_to_keep else None
        if every(step, cfg.save_interval):
            return "sharded" if cfg.save_num_checkpoints_to_keep else None
        return "ephemeral" if every(step, cfg.save_interval_ephemeral) else None

    def pause(self) -> Path:
        """Begin to save now, unless this step is saved in any kind; the folder."""
        self._settle()
        if self.saved is not None and layout.parse_step(self.saved) == self._state.global_step:
            return self.saved
        return self.save()

    def save(self, kind: str | None = None) -> Path:
        """Begin to save now, unless there is what is asked for already; the folder.

        Without a `kind`, that which the run's end has: unsharded where every process holds the
        whole model, or the config saves unsharded ones at all.
        """
        self._settle()
        step = self._state.global_step
        asked = self._unsharded_interval is not None
        if self._lasts(unsharded=kind == "unsharded" or (kind is None and asked)):
            assert self.saved is not None
            return self.saved
        whole = not self._sharded or asked
        kind = kind or ("unsharded" if whole else "sharded")
        folder = self._folder / layout.folder_name(step, unsharded=kind == "unsharded")
        shared: dict[str, Any] = {
            "config_yaml": to_yaml(self._cfg.asdict_for_saving()),
            "train": self._state.state_dict(self._world.size),
        }
        model, optim = dict(self._model.state_dict()), self._optimizer.state_dict()
        retire: Callable[[Path], object]
        if kind == "unsharded":
            # Gathering shards takes every process, writing one.
            model, optim = _copied(model, whole=True), _copied(optim, whole=True)
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
                model=_copied(model, whole=False),
                optim=_copied(optim, whole=False),
                first=self._world.is_rank0,
                group=group,
                wait=lambda: dist.barrier(group=group) if group is not None else None,
                keep=None,
                ephemeral=kind == "ephemeral",
                **shared,
            )
            retire = partial(keep_newest_sharded, keep=self._cfg.save_num_checkpoints_to_keep or 1)
            self._writing = self._thread.submit(self._write, write, retire)
        self.saved, self._passing = folder, kind == "ephemeral"
        return folder

    def _lasts(self, unsharded: bool) -> bool:
        """Whether the newest is of this step and there to stay, and unsharded if it must be."""
        saved = self.saved
        if saved is None or self._passing or layout.parse_step(saved) != self._state.global_step:
            return False
        return layout.is_unsharded(saved) or not unsharded

    def finish(self) -> None:
        """Wait for the save that is under way; raises what went wrong with it."""
        self._settle()

    def send(self, patience: float = math.inf, needed: bool = True) -> None:
        """Wait until what is saved is in remote_save_folder too, for so many seconds at most.

        All processes call it, and ask each other every second: in one long wait for the first,
        which sends, the others would give up. Raises what keeps it from being sent, if it is
        `needed`; else the next start sends it.
        """
        if not self._mirrored:
            return
        end = time.monotonic() + patience
        while self._world.any(self._is_sending() and time.monotonic() < end):
            if self._sending is not None:
                self._sending.join(max(min(1.0, end - time.monotonic()), 0))
        if needed and self._unsent is not None:
            raise self._unsent
        if self._is_sending():
            log.info(f"not sent to {self._cfg.remote_save_folder} yet: the next start does it")

    def give_up(self) -> NoReturn:
        """End the run on every process, with what went wrong where that is known.

        Raises OSError always, or what this process's own save raised.
        """
        self._settle()
        raise FailedElsewhere(
            "another process could not save the checkpoint and says why; this process stops"
        )

    def _settle(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            if (folder := writing.result()) is not None:
                log.info(f"saved {folder}")

    def _write(self, write: Callable[[], Path], retire: Callable[[Path], object]) -> Path:
        """In the thread: write, then remove what that replaces: once it is sent, if it is to be."""
        folder = write()
        if self._mirrored:
            self._begin_to_send(partial(retire, folder))
        elif self._world.is_rank0:
            retire(folder)
        return folder

    def _begin_to_send(self, then: Callable[[], object] = lambda: None) -> None:
        if self._mirrored and self._world.is_rank0:
            work = (self._sending, then)
            self._sending = threading.Thread(target=self._send, args=work, daemon=True, name="send")
            self._sending.start()

    def _is_sending(self) -> bool:
        return self._sending is not None and self._sending.is_alive()

    def _send(self, before: threading.Thread | None, then: Callable[[], object]) -> None:
        """In a thread of its own, after the one `before`: send what is whole.

        What could not be sent is sent after the next save, or else is an error at the end.
        """
        from olmo.checkpoint.mirror import mirror_checkpoints

        if before is not None:
            before.join()
        try:
            mirror_checkpoints(self._folder, str(self._cfg.remote_save_folder))
            self._unsent = None
        except Exception as error:  # of whatever kind: nobody hears of what ends a thread
            log.warning(f"not sent yet: {error}")
            self._unsent = error
        then()


def _copied(value: Any, whole: bool) -> Any:
    """Copies of tensors on the host, gathered if `whole`, in containers of the same kind."""
    if hasattr(value, "full_tensor"):
        return _gathered(value) if whole else _copied_shard(value)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _copied(v, whole) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(v, whole) for v in value)
    return value


def _gathered(value: Any) -> Tensor:
    gathered = value.full_tensor()
    # Where one process has all of it (HSDP whose shards are of one process), nothing was gathered
    # and this is the parameter itself, which training goes on to change.
    is_own = gathered.data_ptr() == value.to_local().data_ptr()
    return gathered.detach().to("cpu", copy=is_own)


def _copied_shard(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    local = value.to_local().detach().to("cpu", copy=True)
    mesh, shape, stride = value.device_mesh, value.shape, value.stride()
    return DTensor.from_local(
        local, mesh, value.placements, run_check=False, shape=shape, stride=stride
    )
