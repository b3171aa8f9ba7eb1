"""OLMo's iterable dataset, for torch's DataLoader. Our trainer has a loader of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from olmo.data.batches import OrderedDataset


class IterableDataset(OrderedDataset, torch.utils.data.IterableDataset[dict[str, Any]]):
    """Yields one process's instances in the run's order, each with its `index`.

    `num_threads` is accepted and has no effect.
    """

    def __init__(self, *args: Any, num_threads: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        indices = self.rank_indices()
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            # torch's loader takes a full batch from each worker in turn. So worker w reads batches
            # w, w + W, …, and every W-th instance of an incomplete last batch.
            size, w, workers = self.device_batch_size, worker.id, worker.num_workers
            in_full_batches = len(indices) // size * size
            indices = np.concatenate(
                [
                    indices[:in_full_batches].reshape(-1, size)[w::workers].reshape(-1),
                    indices[in_full_batches + w :: workers],
                ]
            )
        for index in indices:
            item = self.dataset[int(index)]
            item = item if isinstance(item, dict) else {"input_ids": item}
            yield {**item, "index": int(index)}
