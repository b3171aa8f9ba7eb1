"""Multiple choice: which option is the most likely to a model? One scorer for every task.

A request's tokens are its context's and its continuation's, truncated on the left to the model's
sequence length. Its score is the sum of the log-probabilities of the continuation's tokens.
Requests that differ in their last token only, as the letters A to D, share one row of a batch.

Shapes: N prompts, B rows of a batch, T tokens of a row, V rows of the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from olmo.distributed.watchdog import report_progress
from olmo.distributed.world import World
from olmo.eval.tasks import Request

# OLMo's limit, even for a model with longer sequences: the scores of long prompts depend on it.
MAX_PROMPT_LENGTH = 2048


class Prompt(NamedTuple):
    ids: np.ndarray  # (T + 1,) uint32; the last one is predicted only
    scored: int  # tokens of the continuation, at the end


class Score(NamedTuple):
    value: float
    stderr: float
    """Standard error of the mean over documents; NaN for f1, no mean, and for one document."""

    documents: int


def encode_prompts(pairs: Iterable[tuple[str, str]], tokenizer: Any, length: int) -> list[Prompt]:
    """Encode (context, continuation) pairs for a model with `length` positions.

    `tokenizer` is a tokenizers.Tokenizer. Each part is encoded separately, without special tokens.
    """
    pairs = list(pairs)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    tokens = {
        text: np.array(encoding.ids, dtype=np.uint32)
        for text, encoding in zip(
            texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        )
    }
    prompts = []
    for context, continuation in pairs:
        ids = np.concatenate([tokens[context], tokens[continuation]])[-(length + 1) :]
        prompts.append(Prompt(ids, min(len(tokens[continuation]), len(ids) - 1)))
    return prompts


def compute_log_likelihoods(
    model: nn.Module,
    prompts: Sequence[Prompt],
    batch_size: int,
    pad_token_id: int,
    world: World,
    autocast: AbstractContextManager[Any],
) -> Tensor:
    """Log-probability of each prompt's continuation in nats, (N,) float32 on the CPU.

    Every process computes its share, in as many batches as the others, and returns all of them.
    """
    rows: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt.ids[:-1].tobytes(), []).append(i)
    # The longest first, so that they run out of memory at the start if at all.
    order = sorted(rows.values(), key=lambda row: -len(prompts[row[0]].ids))
    mine = order[world.rank :: world.size]
    values = torch.zeros(len(prompts), device=world.device)
    for start in range(0, math.ceil(len(order) / world.size), batch_size):
        # A process without rows computes the shortest again: a sharded model needs all processes.
        batch = mine[start : start + batch_size]
        inputs = [prompts[row[0]].ids[:-1].astype(np.int64) for row in batch or order[-1:]]
        input_ids = torch.full((len(inputs), max(map(len, inputs))), pad_token_id)
        for ids, row_ids in zip(input_ids, inputs, strict=True):
            ids[: len(row_ids)] = torch.from_numpy(row_ids)
        with autocast:
            logits = model(input_ids.to(world.device)).logits  # (B, T, V)
        report_progress()
        for row, row_ids, row_logits in zip(batch, inputs, logits, strict=False):
            longest = max(prompts[i].scored for i in row)
            known = row_logits[len(row_ids) - longest : len(row_ids)].float().log_softmax(dim=-1)
            for i in row:
                ids, scored = prompts[i]
                expected = torch.from_numpy(ids[len(ids) - scored :].astype(np.int64))
                expected = expected.to(world.device)[:, None]
                values[i] = known[longest - scored :].gather(1, expected).sum()
    return world.sum(values).cpu()


def compute_score(
    metric: str,
    requests: Sequence[Request],
    likelihoods: Tensor,
    unconditional: Tensor | None = None,
) -> Score:
    """A task's metric from the log-likelihood of each request, as OLMo computes it.

    acc: share of documents whose right option has the highest likelihood. len_norm: the highest
    per character. pmi_dc: the highest ratio to the `unconditional` one. f1: of the first option.
    ce_loss, bpb: means over documents of nats per character, bits per byte of the right option.
    """
    if likelihoods.isnan().any():  # argmax would choose the first NaN
        return Score(math.nan, math.nan, len({request.document for request in requests}))
    if metric == "f1":
        predictions = list(_predict(requests, likelihoods.float()).values())
        return Score(_f1(predictions), math.nan, len(predictions))
    results = list(score_documents(metric, requests, likelihoods, unconditional).values())
    n, mean = len(results), sum(results) / len(results)
    variance = sum((result - mean) ** 2 for result in results) / (n - 1) if n > 1 else math.nan
    return Score(mean, math.sqrt(variance / n), n)


def score_documents(
    metric: str,
    requests: Sequence[Request],
    likelihoods: Tensor,
    unconditional: Tensor | None = None,
) -> dict[int, float]:
    """A metric of each document, of which `compute_score` is the mean; f1 is no mean."""
    if likelihoods.isnan().any():
        return {request.document: math.nan for request in requests}
    # float32, as in OLMo: it can decide which of two options wins.
    values = likelihoods.float()
    if metric in ("len_norm", "ce_loss"):
        values = values / torch.tensor([len(r.continuation) - 1 for r in requests])
    elif metric == "bpb":
        values = values / torch.tensor([len(r.continuation[1:].encode()) for r in requests])
        values = values * math.log2(math.e)
    elif metric == "pmi_dc":
        assert unconditional is not None
        values = values / unconditional.float()
    else:
        assert metric == "acc", metric
    if metric in ("ce_loss", "bpb"):  # requests of the right option alone
        found = zip(requests, values.tolist(), strict=True)
        return {request.document: -value for request, value in found}
    predictions = _predict(requests, values).items()
    return {document: float(option == target) for document, (option, target) in predictions}


def _predict(requests: Sequence[Request], values: Tensor) -> dict[int, tuple[int, int]]:
    """Document → its option of the highest value, and the right one."""
    documents: dict[int, list[tuple[int, float, int]]] = {}
    for request, value in zip(requests, values.tolist(), strict=True):
        documents.setdefault(request.document, []).append((request.option, value, request.target))
    predictions = {}
    for document, options in documents.items():
        best = int(np.argmax([value for _, value, _ in options]))  # the first of equal ones
        predictions[document] = (options[best][0], options[best][2])
    return predictions


def _f1(predictions: Sequence[tuple[int, int]]) -> float:
    """F1 of option 0, from (predicted, right) pairs: 2 TP / (predicted + right positives)."""
    true_positives = sum(option == target == 0 for option, target in predictions)
    positives = sum((option == 0) + (target == 0) for option, target in predictions)
    return 2 * true_positives / positives if positives else 0.0
