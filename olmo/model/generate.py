"""Generation: continues token ids one by one, greedily or by sampling, with a key-value cache.

Shapes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo.model.block import KVCache


class OLMoGenerateOutput(NamedTuple):
    token_ids: Tensor
    """(B, 1, steps): the new ids, without the prompt."""

    scores: Tensor
    """(B, 1): the sum of their log-probabilities."""


class GenerationStep(NamedTuple):
    token_ids: Tensor
    """(B,): the new id of each row; eos_token_id in rows that ended before."""

    scores: Tensor
    """(B,): its log-probability; 0 in rows that ended before."""

    ended: Tensor
    """(B,): whether the row has ended."""


def generate_tokens(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_steps: int = 10,
    min_steps: int = 0,
    beam_size: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> OLMoGenerateOutput:
    """All steps of `generate_steps`, which has the arguments.

    Args:
        beam_size: accepted as OLMo has it; must be 1.
    """
    if beam_size != 1:
        raise ValueError(
            f"beam search is not implemented: expected beam_size=1, found {beam_size}; "
            "use temperature, top_k and top_p to sample"
        )
    steps = list(
        generate_steps(
            model, input_ids, attention_mask, max_steps, min_steps,
            temperature, top_k, top_p, generator,
        )
    )  # fmt: skip
    token_ids = torch.stack([step.token_ids for step in steps], dim=1)[:, None]
    scores = torch.stack([step.scores for step in steps]).sum(dim=0)[:, None]
    return OLMoGenerateOutput(token_ids, scores)


def generate_steps(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_steps: int = 10,
    min_steps: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[GenerationStep]:
    """Yield the next ids of all rows, until all rows have ended or `max_steps` is reached.

    Args:
        model: an `OLMo`. Its config.eos_token_id ends a row, and is repeated from there on.
        input_ids: (B, T). Shorter rows are padded on the left, where `attention_mask` (B, T) is 0.
        min_steps: the fewest steps before a row may end.
        temperature: 0 takes the most likely id; above 0 logits are divided by it before sampling.
        top_k: sample from the k most likely ids only.
        top_p: sample from the smallest set of most likely ids that reaches this probability
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).

    Raises:
        ValueError: max_steps below 1, sampling settings out of range, or more positions than a
            model with learned position embeddings has.
    """
    config = model.config
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, found {max_steps}")
    if not (
        0 <= temperature < math.inf  # nor NaN
        and (top_k is None or top_k >= 1)
        and (top_p is None or 0 < top_p <= 1)
    ):
        raise ValueError(
            "expected temperature >= 0, top_k >= 1 and 0 < top_p <= 1, found "
            f"{temperature}, {top_k} and {top_p}"
        )
    has_position_embeddings = not (config.rope or config.alibi)
    if has_position_embeddings and input_ids.shape[1] + max_steps - 1 > config.max_sequence_length:
        raise ValueError(
            f"{input_ids.shape[1]} tokens and {max_steps} new ones do not fit in the "
            f"{config.max_sequence_length} positions that this model has embeddings for"
        )
    B = len(input_ids)
    ended = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    ids, past = input_ids, None
    for step in range(max_steps):
        with torch.no_grad():
            output = model(
                ids,
                attention_mask=attention_mask,
                past_key_values=past,
                use_cache=True,
                last_logits_only=True,
            )
            if past is None:
                capacity = input_ids.shape[1] + max_steps
                past = [KVCache(pair, capacity) for pair in output.attn_key_values]
            log_probs = output.logits[:, -1].float().log_softmax(dim=-1)  # (B, V)
            if step < min_steps:
                log_probs[:, config.eos_token_id] = -torch.inf
            new_ids = _sample(log_probs, temperature, top_k, top_p, generator)  # (B,)
            scores = log_probs.gather(1, new_ids[:, None])[:, 0]
        scores = torch.where(ended, 0.0, scores)
        new_ids = torch.where(ended, config.eos_token_id, new_ids)
        ended = ended | (new_ids == config.eos_token_id)
        yield GenerationStep(new_ids, scores, ended)
        if bool(ended.all()):
            return
        ids = new_ids[:, None]
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(B, 1)), dim=1)


def _sample(
    log_probs: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Ids (B,) drawn from log_probs (B, V)."""
    if temperature == 0.0:
        return log_probs.argmax(dim=-1)
    scaled, order = (log_probs / temperature).sort(dim=-1, descending=True)  # (B, V)
    probabilities = scaled.softmax(dim=-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # of all likelier ids
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, rank)[:, 0]
