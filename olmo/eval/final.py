"""Evaluates a finished checkpoint with our own scorers."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from olmo.checkpoint.read import load_model
from olmo.config import DataConfig, EvaluatorConfig, EvaluatorType, TrainConfig
from olmo.distributed.world import World, join_world
from olmo.eval.choices import compute_score, score_documents
from olmo.eval.evaluators import ChoiceEvaluator
from olmo.eval.perplexity import PER_LABEL, PerplexityEvaluator
from olmo.eval.questions import digest_question
from olmo.eval.tasks import TARGET_METRICS, ChoiceTask, Request
from olmo.model import OLMo
from olmo.runtime import numbers

LABEL = "heldout"


def set_up_evaluation(checkpoint: Path) -> tuple[TrainConfig, World, OLMo]:
    """A final checkpoint's config, this process's world, and the model."""
    cfg = TrainConfig.load(checkpoint / "config.yaml", untrusted=True)
    if cfg.intra_op_threads is not None:
        torch.set_num_threads(cfg.intra_op_threads)
    world = join_world()
    return cfg, world, load_model(checkpoint, world.device)


def measure_perplexity(
    checkpoint: Path, heldout: list[Path], labels: list[Path] | None = None
) -> dict[str, Any]:
    """Loss (nats per token), its standard error over instances, and perplexity on token files.

    It uses the run's precision and batches. `labels`, a mask for each file, says which tokens
    count; then the result also has CrossEntropyLossPerLabel, the mean over these tokens.

    Raises ValueError if the files contain no instance of the model's sequence length.
    """
    cfg, world, model = set_up_evaluation(checkpoint)
    data = DataConfig(
        paths=[str(path) for path in heldout],
        label_mask_paths=None if labels is None else [str(path) for path in labels],
        memmap_dtype=cfg.data.memmap_dtype,
        drop_last=False,
    )
    evaluator = EvaluatorConfig(LABEL, data=data, subset_num_batches=-1)
    heldout_set = PerplexityEvaluator(cfg, evaluator, world)
    instances = len(heldout_set.dataset)
    if instances == 0:
        raise ValueError(
            f"expected held-out instances of {cfg.model.max_sequence_length} tokens, found none in "
            f"{len(heldout)} files; raise heldout_share in the recipe"
        )
    with torch.no_grad():
        losses = heldout_set.losses(model)
    found = losses.metrics(world.sum)
    loss = found[f"eval/{LABEL}/CrossEntropyLoss"]
    results = {
        "CrossEntropyLoss": loss,
        "stderr": nan_to_none(losses.stderr(world.sum)[LABEL]),
        "Perplexity": numbers.perplexity(loss),
        "instances": instances,
    }
    if labels is not None:
        results[PER_LABEL] = found[f"eval/{LABEL}/{PER_LABEL}"]
    return results


class Answers(NamedTuple):
    """What a scorer found; the rows of results.json, questions.parquet and requests.parquet."""

    scores: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    """Each question's own score, for each metric that is a mean over questions."""

    requests: list[dict[str, Any]]
    """Each request with its log-likelihood in nats."""


def score_task(
    checkpoint: Path,
    task: ChoiceTask,
    tokenizer: Path,
    folder: Path | None,
    batch_size: int,
    limit: int | None = None,
) -> Answers:
    """A multiple-choice task: its metrics, of all questions and of each, and its requests.

    Besides the task's own metric these are acc, len_norm, and bpb of the right option, which tells
    small models apart that are right as often as chance is.

    Args:
        folder: contains the data set in OLMo's layout (olmo.eval.rows); None: the hub's.
        limit: only the first so many documents; None: all.

    Raises ValueError if the data set is not available, or its documents have no answers.
    """
    from tokenizers import Tokenizer

    cfg, world, model = set_up_evaluation(checkpoint)
    cfg = cfg.update_with(hf_datasets_cache_dir=None if folder is None else str(folder))
    settings = EvaluatorConfig(
        task.label,
        type=EvaluatorType.downstream,
        device_eval_batch_size=batch_size,
        subset_num_batches=-1,
    )
    encoder = Tokenizer.from_file(str(tokenizer))
    evaluator = ChoiceEvaluator(cfg, settings, world, task, encoder, limit)
    with torch.no_grad():
        conditional, unconditional = evaluator.likelihoods(model)
    metrics = [task.metric]
    if task.metric not in TARGET_METRICS:  # every option is scored, so these cost nothing
        metrics += [name for name in ("acc", "len_norm", "bpb") if name != task.metric]
    asked = evaluator.requests
    by_document: dict[int, list[Request]] = {}
    for request in asked:
        by_document.setdefault(request.document, []).append(request)
    digests = {
        document: digest_question(((r.context, r.continuation) for r in of), of[0].target)
        for document, of in by_document.items()
    }
    scores, questions = [], []
    for metric in metrics:
        # The right option alone decides some metrics.
        used = [
            i for i, r in enumerate(asked) if metric not in TARGET_METRICS or r.option == r.target
        ]
        reference = None if unconditional is None else unconditional[used]
        answers = (metric, [asked[i] for i in used], conditional[used], reference)
        score = compute_score(*answers)
        row = {"metric": metric, "value": score.value, "stderr": nan_to_none(score.stderr)}
        scores.append(row | {"documents": score.documents})
        if metric != "f1":  # no mean over questions
            questions += [
                {"metric": metric, "question": digests[document], "value": value}
                for document, value in score_documents(*answers).items()
            ]
    requests = [
        request._asdict() | {"loglikelihood": value}
        for request, value in zip(asked, conditional.tolist(), strict=True)
    ]
    return Answers(scores, questions, requests)


def nan_to_none(value: float) -> float | None:
    """NaN as None, since JSON has no NaN."""
    return None if math.isnan(value) else value
