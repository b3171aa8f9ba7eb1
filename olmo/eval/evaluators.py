"""A config's `evaluators`: perplexity of held-out files, and multiple-choice tasks.

They are built before training, so that missing data is an error at the start, and then called with
the model after every `eval_interval` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olmo.config import EvaluatorConfig, EvaluatorType, TokenizerConfig, TrainConfig
from olmo.distributed.world import World
from olmo.eval.choices import (
    MAX_PROMPT_LENGTH,
    Score,
    compute_log_likelihoods,
    compute_score,
    encode_prompts,
)
from olmo.eval.perplexity import PerplexityEvaluator
from olmo.eval.tasks import ChoiceTask, Request, build_requests, find_task
from olmo.precision.autocast import autocast_context
from olmo.runtime.log import log
from olmo.tokenizer import Tokenizer

Evaluator = Callable[[nn.Module], dict[str, float]]


def build_evaluators(cfg: TrainConfig, world: World) -> list[Evaluator]:
    """Build the evaluators of a config.

    Raises ValueError for an unknown task, or if its data or the tokenizer are not available.
    """
    found: list[Evaluator] = []
    tokenizer = None
    for evaluator in cfg.evaluators:
        if evaluator.type == EvaluatorType.lm:
            found.append(PerplexityEvaluator(cfg, evaluator, world))
        else:
            task = find_task(evaluator.label)
            tokenizer = tokenizer or load_evaluation_tokenizer(cfg, task.label)
            found.append(ChoiceEvaluator(cfg, evaluator, world, task, tokenizer))
    return found


def run_evaluators(evaluators: Iterable[Evaluator], model: nn.Module) -> dict[str, float]:
    """The metrics of all evaluators, by OLMo's names. Restores the model's mode.

    A compiled model is evaluated eagerly: without gradients, with a smaller last batch and with
    prompts of every length, each call would compile again.
    """
    metrics: dict[str, float] = {}
    was_training, compiled = model.training, model._compiled_call_impl
    model.eval()
    model._compiled_call_impl = None
    try:
        with torch.no_grad():
            for evaluator in evaluators:
                metrics |= evaluator(model)
    finally:
        model._compiled_call_impl = compiled
        model.train(was_training)
    return metrics


class ChoiceEvaluator:
    """A multiple-choice task: reads and encodes its requests once, then scores models."""

    def __init__(
        self,
        cfg: TrainConfig,
        evaluator: EvaluatorConfig,
        world: World,
        task: ChoiceTask,
        tokenizer: Any,
        documents: int | None = None,
    ) -> None:
        """`documents`: use only the first so many."""
        self.task = task
        self._cfg, self._world = cfg, world
        self._batch_size = evaluator.device_eval_batch_size or cfg.device_eval_batch_size
        self.requests = build_requests(task, _folder(cfg))
        if documents is not None:
            numbers = list(dict.fromkeys(r.document for r in self.requests))[:documents]
            self.requests = [r for r in self.requests if r.document in set(numbers)]
        batches = evaluator.subset_num_batches
        batches = cfg.eval_subset_num_batches if batches is None else batches
        if batches > 0:
            self.requests = _limit_requests(self.requests, batches * self._batch_size * world.size)
        length = min(MAX_PROMPT_LENGTH, cfg.model.max_sequence_length)
        pairs = [(r.context, r.continuation) for r in self.requests]
        self.prompts = encode_prompts(pairs, tokenizer, length)
        self.unconditional = None
        if task.metric == "pmi_dc":
            pairs = [(r.unconditional, r.continuation) for r in self.requests]
            self.unconditional = encode_prompts(pairs, tokenizer, length)
        documents = len({r.document for r in self.requests})
        log.info(f"evaluator: {task.label}, {documents} documents, {len(self.prompts)} options")

    def score(self, model: nn.Module) -> Score:
        """The task's metric; all processes get the same."""
        return compute_score(self.task.metric, self.requests, *self.likelihoods(model))

    def likelihoods(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-likelihood of each request, (N,), and for pmi_dc the unconditional ones."""
        cfg, world = self._cfg, self._world

        def likelihoods(prompts: Sequence[Any]) -> torch.Tensor:
            size, pad = self._batch_size, cfg.model.pad_token_id
            kind = autocast_context(cfg, world.device)
            return compute_log_likelihoods(model, prompts, size, pad, world, kind)

        conditional = likelihoods(self.prompts)
        if self.unconditional is None:
            return conditional, None
        return conditional, likelihoods(self.unconditional)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        metric = self.task.metric
        group = f"downstream_{metric}" if metric in ("ce_loss", "bpb") else "downstream"
        return {f"eval/{group}/{self.task.label}_{metric}": self.score(model).value}


def load_evaluation_tokenizer(cfg: TrainConfig, label: str) -> Any:
    """The config's tokenizer, a tokenizers.Tokenizer: a file, also below hf_datasets_cache_dir as
    in ai2-olmo, or one of the hub."""
    name, folder = cfg.tokenizer.identifier, _folder(cfg)
    if folder is not None and not Path(name).is_file() and (folder / name).is_file():
        cfg = cfg.update_with(tokenizer=TokenizerConfig(str(folder / name)))
    try:
        return Tokenizer.from_train_config(cfg).base_tokenizer
    except Exception as error:  # the libraries raise no narrower class
        raise ValueError(
            f"evaluators: '{label}' needs the tokenizer of the training data: {error}; name its "
            "file with --tokenizer.identifier=FILE"
        ) from error


def _folder(cfg: TrainConfig) -> Path | None:
    return Path(cfg.hf_datasets_cache_dir) if cfg.hf_datasets_cache_dir else None


def _limit_requests(requests: list[Request], limit: int) -> list[Request]:
    """The first `limit` requests, without those of a document that is incomplete among them."""
    incomplete = {r.document for r in requests[limit:]}
    limited = [r for r in requests[:limit] if r.document not in incomplete]
    if not limited:
        raise ValueError(
            f"evaluators: expected a complete document, found none in {limit} requests; raise "
            "subset_num_batches"
        )
    return limited
