"""Bits per byte of documents, each by itself from its beginning: the number that papers compare.

As lm-eval's `loglikelihood_rolling` (EleutherAI/lm-evaluation-harness): a document follows the
end-of-text token, and is read in windows of the model's length; each token is predicted once, and
the last window is filled with what came before it. In the loop (`olmo.eval.perplexity`) a document
is cut where an instance ends, and sees the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from olmo.eval.final import set_up_evaluation
from olmo.precision.autocast import autocast_context


@dataclass(frozen=True)
class EncodedDocument:
    """A document's tokens, without the end-of-text token before and behind them."""

    id: str
    digest: str  # of its text
    ids: Sequence[int]  # (N,)
    bytes: int  # UTF-8 bytes of the text whose tokens count
    counts: np.ndarray | None = None  # (N,) bool; None: all tokens


def measure_documents(
    checkpoint: Path, documents: Sequence[EncodedDocument]
) -> list[dict[str, Any]]:
    """A row for each document: document (its id), digest, tokens and bytes that count, their nats.

    It uses the run's precision and batches.
    """
    cfg, world, model = set_up_evaluation(checkpoint)
    length, eos, pad = (
        cfg.model.max_sequence_length,
        cfg.model.eos_token_id,
        cfg.model.pad_token_id,
    )
    windows = [
        (number, start, inputs, labels)
        for number, document in enumerate(documents)
        for start, inputs, labels in rolling_windows(document.ids, eos, length)
    ]
    windows.sort(key=lambda window: -len(window[2]))  # alike in length, so little padding
    nats, size = np.zeros(len(documents)), cfg.device_eval_batch_size
    for first in range(0, len(windows), size):
        batch = windows[first : first + size]
        shape = len(batch), len(batch[0][2])
        ids, labels = torch.full(shape, pad), torch.full(shape, -100)
        for row, (number, start, inputs, predicted) in enumerate(batch):
            ids[row, : len(inputs)] = torch.tensor(inputs)
            last = labels[row, len(inputs) - len(predicted) : len(inputs)]
            last[:] = torch.tensor(predicted)
            if (counts := documents[number].counts) is not None:
                counted = torch.from_numpy(counts[start : start + len(predicted)])
                last.masked_fill_(~counted, -100)
        with torch.no_grad(), autocast_context(cfg, world.device):
            logits = model(ids.to(world.device)).logits.float()  # (B, T, V)
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.to(world.device).flatten(), reduction="none"
        )
        sums = losses.view(shape).double().sum(dim=1).tolist()
        for (number, *_), loss in zip(batch, sums, strict=True):
            nats[number] += loss
    return [
        {
            "document": document.id,
            "digest": document.digest,
            "tokens": len(document.ids) if document.counts is None else int(document.counts.sum()),
            "bytes": document.bytes,
            "nats": float(loss),
        }
        for document, loss in zip(documents, nats, strict=True)
    ]


def rolling_windows(
    ids: Sequence[int], prefix: int, length: int
) -> Iterator[tuple[int, list[int], list[int]]]:
    """(place of the first predicted token, inputs, the tokens that the last of these predict).

    >>> list(rolling_windows([5, 6, 7, 8], 0, 3))
    [(0, [0, 5, 6], [5, 6, 7]), (3, [5, 6, 7], [8])]
    """
    whole = [prefix, *ids]
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield start, whole[max(0, end - length) : end], whole[start + 1 : end + 1]
