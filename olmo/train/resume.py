"""Where a run starts: afresh, from its own newest checkpoint, or from load_path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from olmo.checkpoint import layout
from olmo.checkpoint.read import Checkpoint, find_newest, open_checkpoint
from olmo.config import TrainConfig
from olmo.distributed.world import World
from olmo.runtime.log import log
from olmo.train.state import TrainState

T = TypeVar("T")


@dataclass
class Start:
    """What a run starts from."""

    state: TrainState
    checkpoint: Checkpoint | None = None  # None: weights are initialised
    resumed: bool = False  # this folder's own run continues; its metrics and indices are kept


def find_start(cfg: TrainConfig, world: World) -> Start:
    """What to start from; rank 0 looks, verifies and downloads for all.

    Raises:
        ValueError: load_path contains no checkpoint, a broken one, or one without the required
            parts; remote_save_folder is not available, or contains another run.
        OSError: load_path is missing or not readable.
    """
    folder = Path(cfg.save_folder)
    if cfg.try_load_latest_save:
        own = _on_rank0(world, partial(_newest, cfg, folder))
        if own is not None:
            checkpoint = open_checkpoint(own)
            assert checkpoint.train is not None
            log.info(f"resuming from {own}")
            state = TrainState.from_checkpoint(checkpoint.train, cfg)
            # Never back: it may be past its first epoch.
            _enter_epoch(max(cfg.epoch or 0, state.epoch), state)
            _fast_forward(state, cfg)
            return Start(state, checkpoint, resumed=True)
    if cfg.load_path is None:
        _on_rank0(world, partial(_begin_remote, cfg, -1))
        return Start(TrainState(epoch=cfg.epoch or 0))
    place = Path(cfg.load_path)
    parts = {
        "optimizer": not cfg.reset_optimizer_state,
        "trainer": not cfg.reset_trainer_state,
    }
    if "://" in cfg.load_path:
        place = _on_rank0(world, partial(_download, cfg.load_path, folder / "loaded", parts))
    _on_rank0(world, partial(layout.verify_checkpoint, place))
    checkpoint = open_checkpoint(place, **parts)
    state = TrainState(epoch=cfg.epoch or 0)
    if checkpoint.train is not None:
        state = TrainState.from_checkpoint(checkpoint.train, cfg)
        if not cfg.restore_dataloader:
            state = TrainState()
        elif cfg.epoch is not None:
            _enter_epoch(cfg.epoch, state)
        _fast_forward(state, cfg)
    in_place = checkpoint.folder.resolve().parent == folder.resolve()
    resumed = in_place and checkpoint.train is not None
    _on_rank0(world, partial(_begin_remote, cfg, state.global_step if resumed else -1))
    return Start(state, checkpoint, resumed)


def _newest(cfg: TrainConfig, folder: Path) -> Path | None:
    """The run's newest whole checkpoint, in its folder or in remote_save_folder."""
    own = find_newest(folder)
    if cfg.remote_save_folder is None:
        return own
    from olmo.checkpoint.mirror import find_newest_or_download

    return find_newest_or_download(own, folder, cfg.remote_save_folder)


def _begin_remote(cfg: TrainConfig, step: int) -> None:
    if cfg.remote_save_folder is not None and not cfg.dry_run:
        from olmo.checkpoint.mirror import prepare_remote

        prepare_remote(cfg.remote_save_folder, step, cfg.save_overwrite)


def _download(url: str, into: Path, parts: dict[str, bool]) -> Path:
    from olmo.checkpoint.mirror import download_checkpoint

    log.info(f"fetching {url}")
    return download_checkpoint(url, into, **parts)


def _on_rank0(world: World, work: Callable[[], T]) -> T:
    """The result of `work` on rank 0, or its error, on every rank."""
    found: Any = None
    if world.is_rank0:
        try:
            found = work()
        except (ValueError, OSError) as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, Exception):
        raise found
    return found


def _enter_epoch(epoch: int, state: TrainState) -> None:
    if epoch != state.epoch:
        log.info(f"epoch {epoch} begins, in place of epoch {state.epoch}")
        state.begin_epoch(epoch)


def _fast_forward(state: TrainState, cfg: TrainConfig) -> None:
    if batches := cfg.fast_forward_batches:
        log.info(f"fast_forward_batches: skips {batches} batches")
        state.global_train_examples_seen_this_epoch += batches * cfg.global_train_batch_size
