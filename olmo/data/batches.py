"""From the order to batches: which process reads which instance, and how they become tensors.

With a global batch size G and a world size W, process r computes, of the order's instances
s*G … (s+1)*G - 1 at step s, every W-th beginning with the r-th. Nothing else decides the data: a
run may continue with another world size, and prefetching changes nothing.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from olmo.config import DataConfig, TrainConfig
from olmo.config.checks import check_data
from olmo.data import order
from olmo.data.collator import build_collator
from olmo.data.custom_datasets import build_custom_dataset
from olmo.data.memmap import MemMapDataset, build_memmap_dataset
from olmo.distributed.world import barrier, get_fs_local_rank, get_global_rank, get_world_size


def get_labels(batch: dict[str, Any]) -> torch.Tensor:
    """The token that each position predicts, (B, T) int64; -100 where it is masked.

    The last position predicts nothing. label_mask, attention_mask (padding) and instance_mask
    mask the label itself, not the position before it.
    """
    labels = batch["input_ids"].clone()
    if (label_mask := batch.get("label_mask")) is not None:
        labels.masked_fill_(~label_mask, -100)
    if (attention_mask := batch.get("attention_mask")) is not None:
        labels.masked_fill_(attention_mask == 0.0, -100)
    if (instance_mask := batch.get("instance_mask")) is not None:
        labels.masked_fill_(~instance_mask[:, None], -100)
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def select_model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The fields of a batch that the model's forward takes."""
    names = ("input_ids", "attention_mask", "attention_bias", "doc_lens", "max_doc_lens")
    return {name: batch[name] for name in names if name in batch}


class OrderedDataset:
    """A dataset in the run's order, and this process's share of it.

    `start_index` and `max_examples` count over all processes and are multiples of
    `global_batch_size`. With `work_dir`, the order is saved there as global_indices.npy; with
    `order_path`, the first epoch's order is read from that file instead of being made. A `mixture`
    is such an order of any length (olmo.data.mixture), after which the run ends.
    """

    def __init__(
        self,
        dataset: Any,
        global_batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start_index: int = 0,
        max_examples: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        world_size: int | None = None,
        rank: int | None = None,
        fs_local_rank: int | None = None,
        work_dir: str | Path | None = None,
        order_path: str | Path | None = None,
        mixture: bool = False,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.start_index = start_index
        self.max_examples = max_examples
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.world_size = get_world_size() if world_size is None else world_size
        self.rank = get_global_rank() if rank is None else rank
        if global_batch_size % self.world_size:
            raise ValueError(
                f"global_train_batch_size={global_batch_size} is not a multiple of the "
                f"{self.world_size} processes; change one of them"
            )
        self.global_batch_size = global_batch_size
        self.device_batch_size = global_batch_size // self.world_size
        self._order_path, self._order_epoch, self.mixture = order_path, epoch, mixture
        instances = len(self._read_mixture()) if mixture else len(dataset)
        self.total_size = order.total_size(instances, self.world_size, drop_last)
        # One process per file system writes the order. On a shared one several do, and write the
        # same bytes.
        self.fs_local_rank = get_fs_local_rank() if fs_local_rank is None else fs_local_rank
        self.work_dir = None if work_dir is None else Path(work_dir)
        self.global_indices_file: Path | None = None
        if self.work_dir is not None:
            self._save_global_indices()

    def _save_global_indices(self) -> None:
        assert self.work_dir is not None
        self.global_indices_file = self.work_dir / "global_indices.npy"
        if self.fs_local_rank == 0:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            partial = self.work_dir / f".global_indices.{self.rank}.{os.getpid()}"
            order.write_order(self._build_global_indices(), partial)
            partial.replace(self.global_indices_file)
        barrier()

    def _build_global_indices(self) -> np.ndarray:
        n = len(self.dataset)
        if self.mixture:
            indices = self._read_mixture()
        elif self._order_path is not None and self._order_epoch == self.epoch:
            indices = order.read_order(self._order_path, n)
        else:
            indices = order.global_indices(n, self.seed, self.epoch, self.shuffle)
        return order.fit_to_world_size(indices, self.world_size, self.drop_last)

    def _read_mixture(self) -> np.ndarray:
        if self._order_path is None:
            raise ValueError("data.mixture: expected its order in data.order_path, found none")
        indices = order.read_order(self._order_path)
        if self.epoch != self._order_epoch or not len(indices):
            raise ValueError(
                f"{self._order_path}: expected the instances of the whole run, found "
                f"{len(indices):,}, since a mixture has no second epoch; make the order longer, or "
                "the run shorter (max_duration)"
            )
        if (last := int(indices.max())) >= len(self.dataset):
            raise ValueError(
                f"{self._order_path}: expected instances below {len(self.dataset):,}, as many as "
                f"the token files have, found {last:,}; the order belongs to other data, or to "
                "another max_sequence_length"
            )
        return indices

    def get_global_indices(self) -> np.ndarray:
        """The epoch's order over all processes, padded or cut to a multiple of them, uint32."""
        if self.global_indices_file is not None:
            return order.read_order(self.global_indices_file)
        return self._build_global_indices()

    def reshuffle(self, epoch: int) -> None:
        """Switch to another epoch's order."""
        self.epoch = epoch
        if self.work_dir is not None:
            self._save_global_indices()

    def remaining_indices(self) -> np.ndarray:
        """What all processes together read from `start_index` on, in order."""
        return self.get_global_indices()[: self.max_examples][self.start_index :]

    def rank_indices(self) -> np.ndarray:
        """What this process reads from `start_index` on, in order."""
        return self.remaining_indices()[self.rank : self.total_size : self.world_size]


class TrainLoader:
    """This process's batches in order, prefetched by a thread.

    A batch has the fields of `DataCollator` and the `index` of each instance. Set
    `dataset.start_index` to start the next iteration elsewhere.
    """

    # Batches in the queue. Reading one is a copy from the page cache, so two keep the queue full.
    PREFETCH = 2

    def __init__(
        self,
        dataset: OrderedDataset,
        collator: Callable[[Any], dict[str, Any]],
        drop_last: bool,
        pin_memory: bool,
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collator
        self.batch_size = dataset.device_batch_size
        self.drop_last = drop_last
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        """Batches left; with drop_last the same number on all processes."""
        if self.drop_last:  # where start_index is no multiple of them, their shares differ by one
            return len(self.dataset.remaining_indices()) // self.dataset.global_batch_size
        return -(-len(self.dataset.rank_indices()) // self.batch_size)

    def load_batch(self, indices: np.ndarray) -> dict[str, Any]:
        """The batch of these (B,) instances, whatever the order says."""
        source = self.dataset.dataset
        if isinstance(source, MemMapDataset):
            batch = source.batch(indices)
        else:
            items = [source[int(i)] for i in indices]
            batch = self.collate_fn(items)
        batch["index"] = torch.from_numpy(indices.astype(np.int64))
        if self.pin_memory:
            batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
        return batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        indices, size = self.dataset.rank_indices(), self.batch_size
        steps = len(self)
        batches: queue.Queue[Any] = queue.Queue(self.PREFETCH)
        stopped = threading.Event()

        def put(value: Any) -> None:
            while not stopped.is_set():
                try:
                    return batches.put(value, timeout=0.1)
                except queue.Full:
                    continue

        def prefetch() -> None:
            try:
                for step in range(steps):
                    if stopped.is_set():
                        return
                    put(self.load_batch(indices[step * size : (step + 1) * size]))
            except BaseException as error:  # raised in the main thread
                put(error)

        thread = threading.Thread(target=prefetch, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range(steps):
                batch = batches.get()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stopped.set()
            thread.join()


def build_train_dataloader(
    train_config: TrainConfig,
    *,
    world_size: int | None = None,
    rank: int | None = None,
    fs_local_rank: int | None = None,
    include_instance_metadata: bool = False,
) -> TrainLoader:
    """This process's batches of the run, whose order is saved in <save_folder>/train_data.

    Raises ValueError if the folder already contains another run's order, unless save_overwrite or
    try_load_latest_save is set.
    """
    data = train_config.data
    check_data(data)
    work_dir = Path(train_config.save_folder) / "train_data"
    rank = get_global_rank() if rank is None else rank
    may_exist = train_config.save_overwrite or train_config.try_load_latest_save
    if rank == 0 and work_dir.is_dir() and not may_exist:
        raise ValueError(
            f"{train_config.save_folder} already contains a run; give --try_load_latest_save to "
            "continue it, --save_overwrite to overwrite it, or another --save_folder"
        )
    instances = (
        build_custom_dataset(train_config)
        if data.custom_dataset
        else build_memmap_dataset(train_config, data, include_instance_metadata)
    )
    dataset = OrderedDataset(
        instances,
        train_config.global_train_batch_size,
        seed=train_config.data_seed,
        epoch=train_config.epoch or 0,
        drop_last=data.drop_last,
        world_size=world_size,
        rank=rank,
        fs_local_rank=fs_local_rank,
        work_dir=work_dir,
        order_path=data.order_path,
        mixture=bool(data.mixture),
    )
    # data.pin_memory is ignored: a copy from pageable memory makes the host wait for the device.
    pin = torch.cuda.is_available()
    return TrainLoader(dataset, build_collator(train_config), data.drop_last, pin)


def build_eval_batches(
    train_config: TrainConfig, data_config: DataConfig, batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Any]]:
    """One process's batches of an evaluation set, in stored order; the last may be smaller.

    All processes get batches of the same shapes, since a sharded model must be called by all of
    them together. Where the instances run out, instance 0 is repeated and `counts` (B,) is False.
    """
    dataset = build_memmap_dataset(train_config, data_config)
    n = len(dataset)
    indices = np.arange(order.total_size(n, world_size, drop_last=False))[rank::world_size]
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        counts = torch.from_numpy(batch < n)
        yield dataset.batch(np.where(batch < n, batch, 0)) | {"counts": counts}
