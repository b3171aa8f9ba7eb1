"""Loss and perplexity on held-out token files.

As OLMo does it: the mean over instances of the mean over their T-1 predicted tokens, masked ones
counting as 0. Every instance counts once, for any batch size and number of processes. If labels are
masked, the mean over the labels that count is reported, too (not in OLMo).

Where the bytes of each token are known (data.token_bytes_paths), bits per byte are reported (not in
OLMo): the loss of the predicted tokens that stand for text, by these tokens' bytes. The first token
of an instance is not predicted, and has neither. What ends a document costs nats and has no bytes;
it is left out, as by lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo.config import EvaluatorConfig, TrainConfig
from olmo.data.batches import build_eval_batches, get_labels, select_model_inputs
from olmo.data.memmap import MemMapDataset, build_memmap_dataset
from olmo.distributed.watchdog import report_progress
from olmo.distributed.world import World
from olmo.precision.autocast import autocast_context
from olmo.runtime.numbers import perplexity

PER_LABEL = "CrossEntropyLossPerLabel"
BITS_PER_BYTE = "BitsPerByte"


def compute_token_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Cross-entropy of each predicted token in nats, (B, T-1) float32; 0 where it is masked."""
    logits = model(**select_model_inputs(batch)).logits  # (B, T, V)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        get_labels(batch).flatten(),
        ignore_index=-100,
        reduction="none",
    )
    return losses.view(logits.shape[:2])[:, :-1]


class LossByLabel:
    """Sums of instance losses, by the data set that each instance is from."""

    def __init__(self, label: str, dataset: MemMapDataset, device: torch.device) -> None:
        """Instances go by their file's metadata `label`, by `label` where it has none."""
        self._names = sorted({row.get("label", label) for row in dataset.metadata})
        self._default = label
        self._masked = dataset.label_mask_paths is not None
        # Rows: sum of instance losses, of their squares, number of instances; sum of the losses of
        # labels, number of labels; sum of the losses of text, its bytes.
        self._sums = torch.zeros(7, len(self._names), dtype=torch.float64, device=device)

    def add(self, batch: dict[str, Any], token_losses: Tensor) -> None:
        """Add a batch with its losses of `compute_token_losses`."""
        losses = token_losses.mean(dim=1)
        names = [row.get("label", self._default) for row in batch["metadata"]]
        where = torch.tensor([self._names.index(name) for name in names], device=losses.device)
        losses = losses.double()
        counts = batch["counts"].double() if "counts" in batch else torch.ones_like(losses)
        summed = losses * counts
        is_label = get_labels(batch)[:, :-1] != -100
        labels = is_label.sum(dim=1) * counts
        label_losses = summed * token_losses.shape[1]
        terms = [summed, losses.square() * counts, counts, label_losses, labels]
        if "token_bytes" in batch:
            sizes = batch["token_bytes"][:, 1:]  # of the predicted tokens
            is_text = is_label & (sizes >= 0)
            nats = (token_losses.double() * is_text).sum(dim=1)
            terms += [nats * counts, (sizes * is_text).sum(dim=1) * counts]
        else:
            terms += [torch.zeros_like(losses)] * 2
        self._sums.index_add_(1, where, torch.stack(terms))

    def metrics(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """eval/<label>/CrossEntropyLoss, /Perplexity and, if labels are masked, PER_LABEL;
        BITS_PER_BYTE, if the bytes of tokens are known.

        `add_up` sums a tensor over processes.
        """
        sums = add_up(self._sums).T.tolist()
        out = {}
        for name, (loss, _, n, label_loss, labels, nats, size) in zip(
            self._names, sums, strict=True
        ):
            if labels and self._masked:  # first, for the others count tokens that are not learned
                out[f"eval/{name}/{PER_LABEL}"] = label_loss / labels
            if n:
                out[f"eval/{name}/CrossEntropyLoss"] = loss / n
                out[f"eval/{name}/Perplexity"] = perplexity(loss / n)
            if size:
                out[f"eval/{name}/{BITS_PER_BYTE}"] = nats / size / math.log(2)
        return out

    def stderr(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Standard error of the mean over instances by label, in nats; NaN for a single one."""
        out = {}
        sums = add_up(self._sums)[:3].tolist()
        for name, loss, square, n in zip(self._names, *sums, strict=True):
            variance = max(square - loss**2 / n, 0.0) / (n - 1) if n > 1 else math.nan
            out[name] = math.sqrt(variance / n) if n else math.nan
        return out


class PerplexityEvaluator:
    """Loss and perplexity on held-out token files, read in stored order."""

    def __init__(self, cfg: TrainConfig, evaluator: EvaluatorConfig, world: World) -> None:
        self._cfg, self._world = cfg, world
        self._label, self._data = evaluator.label, evaluator.data
        self._batch_size = evaluator.device_eval_batch_size or cfg.device_eval_batch_size
        batches = evaluator.subset_num_batches
        self._batches = cfg.eval_subset_num_batches if batches is None else batches
        self.dataset = build_memmap_dataset(cfg, evaluator.data)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return self.losses(model).metrics(self._world.sum)

    def losses(self, model: nn.Module) -> LossByLabel:
        """The sums over this process's share of the instances."""
        cfg, world = self._cfg, self._world
        losses = LossByLabel(self._label, self.dataset, world.device)
        batches = build_eval_batches(cfg, self._data, self._batch_size, world.rank, world.size)
        for batch in islice(batches, self._batches if self._batches > 0 else None):
            batch = {k: v.to(world.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            with autocast_context(cfg, world.device):
                values = compute_token_losses(model, batch)
            losses.add(batch, values)
            report_progress()
        return losses
