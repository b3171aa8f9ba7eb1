"""Loss and perplexity on held-out token files.

As OLMo does it: the mean over instances of the mean over their T-1 predicted tokens, masked ones
counting as 0. Every instance counts, whatever the batch size and the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo.data.batches import labels_of, model_inputs
from olmo.data.memmap import MemMapDataset


def instance_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Mean cross-entropy of each instance in nats, (B,) float32."""
    logits = model(**model_inputs(batch)).logits  # (B, T, V)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        labels_of(batch).flatten(),
        ignore_index=-100,
        reduction="none",
    )
    return losses.view(logits.shape[:2])[:, :-1].mean(dim=1)


class LossByLabel:
    """Sums of instance losses, by the data set that each instance is from."""

    def __init__(self, label: str, dataset: MemMapDataset, device: torch.device) -> None:
        """Instances go by their file's metadata `label`, by `label` where it has none."""
        self._names = sorted({row.get("label", label) for row in dataset.metadata})
        self._default = label
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)

    def add(self, batch: dict[str, Any], losses: Tensor) -> None:
        labels = [row.get("label", self._default) for row in batch["metadata"]]
        where = torch.tensor([self._names.index(label) for label in labels], device=losses.device)
        counts = batch["counts"].double() if "counts" in batch else torch.ones_like(losses).double()
        self._sums.index_add_(1, where, torch.stack([losses.double() * counts, counts]))

    def metrics(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """eval/<label>/CrossEntropyLoss and /Perplexity, over what `add_up` sums over processes."""
        total, count = add_up(self._sums).tolist()
        out = {}
        for name, loss, n in zip(self._names, total, count, strict=True):
            if n:
                out[f"eval/{name}/CrossEntropyLoss"] = loss / n
                out[f"eval/{name}/Perplexity"] = math.exp(loss / n)
        return out


def evaluate(
    model: nn.Module,
    label: str,
    dataset: MemMapDataset,
    batches: Iterator[dict[str, Any]],
    device: torch.device,
    autocast: AbstractContextManager[Any],
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Losses of this process's `batches` of `dataset`, added up over processes by `add_up`."""
    losses = LossByLabel(label, dataset, device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            with autocast:
                values = instance_losses(model, batch)
            losses.add(batch, values)
    model.train(was_training)
    return losses.metrics(add_up)
