"""Multiple choice: which option does a model think most likely? One scorer for every task.

A request's tokens are its context's and its continuation's, cut on the left to what the model
takes in; what counts is the sum of the log-probabilities of the continuation's. Requests that
differ in their last token only, such as the letters A to D, are one row to the model.

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

# As OLMo has it, even where a model takes in more: the numbers of long prompts depend on it.
MAX_PROMPT_LENGTH = 2048


class Prompt(NamedTuple):
    ids: np.ndarray  # (T + 1,) uint32, the last of them only predicted
    scored: int  # so many at the end are the continuation


class Score(NamedTuple):
    value: float
    stderr: float
    """Of the mean over documents; NaN for f1, which is none, and for a single document."""

    documents: int


def encode_prompts(pairs: Iterable[tuple[str, str]], tokenizer: Any, length: int) -> list[Prompt]:
    """(context, continuation) as a model with `length` positions is given them.

    `tokenizer` is a tokenizers.Tokenizer. Each part is encoded on its own, without special tokens.
    """
    pairs = list(pairs)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    tokens = {
        text: np.array(encoding.ids, dtype=np.uint32)
        for text, encoding in zip(
            texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        )
    }
    found = []
    for context, continuation in pairs:
        ids = np.concatenate([tokens[context], tokens[continuation]])[-(length + 1) :]
        found.append(Prompt(ids, min(len(tokens[continuation]), len(ids) - 1)))
    return found


def compute_log_likelihoods(
    model: nn.Module,
    prompts: Sequence[Prompt],
    batch_size: int,
    pad_token_id: int,
    world: World,
    autocast: AbstractContextManager[Any],
) -> Tensor:
    """Log-probability of each prompt's continuation in nats, (N,) float32 on the CPU.

    Every process computes its share, in as many batches as the others, and gets all numbers.
    """
    rows: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt.ids[:-1].tobytes(), []).append(i)
    # The longest first: should they need more memory than there is, that is known at once.
    order = sorted(rows.values(), key=lambda row: -len(prompts[row[0]].ids))
    mine = order[world.rank :: world.size]
    values = torch.zeros(len(prompts), device=world.device)
    for start in range(0, math.ceil(len(order) / world.size), batch_size):
        # A process that has no row left computes the shortest again, for nobody.
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

    acc: the right option has the highest. len_norm: the highest per character. pmi_dc: the highest
    ratio to the `unconditional` one. f1: of the first option. ce_loss and bpb, which are means over
    documents: nats per character and bits per byte of the right option.
    """
    # float32, as in OLMo: which of two options wins can hang on it.
    values = likelihoods.float()
    if values.isnan().any():  # argmax would take the first of them for an answer
        return Score(math.nan, math.nan, len({request.document for request in requests}))
    if metric in ("len_norm", "ce_loss"):
        values = values / torch.tensor([len(r.continuation) - 1 for r in requests])
    elif metric == "bpb":
        values = values / torch.tensor([len(r.continuation[1:].encode()) for r in requests])
        values = values * math.log2(math.e)
    elif metric == "pmi_dc":
        assert unconditional is not None
        values = values / unconditional.float()
    else:
        assert metric in ("acc", "f1"), metric

    documents: dict[int, list[tuple[int, float, int]]] = {}
    for request, value in zip(requests, values.tolist(), strict=True):
        documents.setdefault(request.document, []).append((request.option, value, request.target))
    if metric in ("ce_loss", "bpb"):
        results = [-value for ((_, value, _),) in documents.values()]
    else:
        chosen = []
        for options in documents.values():
            best = int(np.argmax([value for _, value, _ in options]))  # of equal ones the first
            chosen.append((options[best][0], options[best][2]))
        if metric == "f1":
            return Score(_f1(chosen), math.nan, len(chosen))
        results = [float(option == target) for option, target in chosen]
    n, mean = len(results), sum(results) / len(results)
    variance = sum((result - mean) ** 2 for result in results) / (n - 1) if n > 1 else math.nan
    return Score(mean, math.sqrt(variance / n), n)


def _f1(chosen: Sequence[tuple[int, int]]) -> float:
    """Harmonic mean of precision and recall of option 0, from (chosen, right) pairs."""
    both = sum(option == target == 0 for option, target in chosen)
    either = sum((option == 0) + (target == 0) for option, target in chosen)
    return 2 * both / either if either else 0.0
