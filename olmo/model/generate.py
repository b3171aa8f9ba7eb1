"""Continuing a text token by token, greedily or by sampling, with keys and values kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo.model.block import KVCache


class OLMoGenerateOutput(NamedTuple):
    token_ids: Tensor
    """(B, 1, steps): the new ids, without those that were given."""

    scores: Tensor
    """(B, 1): the sum of their log-probabilities."""


class Step(NamedTuple):
    chosen: Tensor
    """(B,): the new id of each row; that of the end in rows that had ended before."""

    scores: Tensor
    """(B,): its log-probability, 0 in rows that had ended before."""

    ended: Tensor
    """(B,): whether the row has ended."""


def generate(
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
    """Continue each row of `input_ids` until all have ended or `max_steps` is reached.

    `steps` gives the ids one by one; its arguments are the same, but for:

    Args:
        beam_size: accepted as OLMo has it; there is no beam search, so 1.
    """
    if beam_size != 1:
        raise ValueError(
            f"there is no beam search here: expected beam_size=1, found {beam_size}; "
            "temperature, top_k and top_p sample"
        )
    found = list(
        steps(
            model, input_ids, attention_mask, max_steps, min_steps,
            temperature, top_k, top_p, generator,
        )
    )  # fmt: skip
    token_ids = torch.stack([step.chosen for step in found], dim=1)[:, None]
    scores = torch.stack([step.scores for step in found]).sum(dim=0)[:, None]
    return OLMoGenerateOutput(token_ids, scores)


def steps(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_steps: int = 10,
    min_steps: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """The ids that continue each row of `input_ids`, until all have ended or after `max_steps`.

    Args:
        model: an `OLMo`; its config.eos_token_id ends a row, which goes on repeating it.
        input_ids: (B, T). Rows of different lengths are padded on the left, and `attention_mask`
            (B, T) is 0 there.
        min_steps: no row ends before so many.
        temperature: 0 takes the likeliest id each time, 1 samples as the model says.
        top_k: sample from the likeliest k ids only.
        top_p: sample from the likeliest ids that together reach this probability (nucleus
            sampling, Holtzman et al. 2020, arXiv:1904.09751).

    Raises:
        ValueError: no step, settings that leave nothing to sample from, or a text longer than the
            positions that the model has learned.
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
            "expected temperature from 0 on, top_k from 1 on and top_p above 0 and up to 1, found "
            f"{temperature}, {top_k} and {top_p}"
        )
    learned = not (config.rope or config.alibi)
    if learned and input_ids.shape[1] + max_steps - 1 > config.max_sequence_length:
        raise ValueError(
            f"{input_ids.shape[1]} tokens and {max_steps} more do not fit in the "
            f"{config.max_sequence_length} positions that this model has learned"
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
                past = [KVCache(one, capacity) for one in output.attn_key_values]
            log_probs = output.logits[:, -1].float().log_softmax(dim=-1)  # (B, V)
            if step < min_steps:
                log_probs[:, config.eos_token_id] = -torch.inf
            chosen = _choose(log_probs, temperature, top_k, top_p, generator)  # (B,)
            scores = log_probs.gather(1, chosen[:, None])[:, 0]
        scores = torch.where(ended, 0.0, scores)
        chosen = torch.where(ended, config.eos_token_id, chosen)
        ended = ended | (chosen == config.eos_token_id)
        yield Step(chosen, scores, ended)
        if bool(ended.all()):
            return
        ids = chosen[:, None]
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(B, 1)), dim=1)


def _choose(
    log_probs: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    if temperature == 0.0:
        return log_probs.argmax(dim=-1)
    scaled, order = (log_probs / temperature).sort(dim=-1, descending=True)  # (B, V)
    probabilities = scaled.softmax(dim=-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    place = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, place)[:, 0]
