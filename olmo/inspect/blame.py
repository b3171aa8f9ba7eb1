"""Which documents moved the loss of a step: those of the step itself, and those trained before."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from olmo.inspect.group_testing import Group, Search, find_guilty
from olmo.inspect.replay import LOSS, find_start_checkpoint, read_step_metrics
from olmo.inspect.run import TrainedRun
from olmo.runtime.log import log
from olmo.train.segments import merge_equal, read_segments, training_conditions

if TYPE_CHECKING:
    from olmo.inspect.window import Measured, Seen, Window

WINDOW = 20  # steps: after so many, AdamW's mean of gradients (beta 0.9) has forgotten 88 %
BUDGET = 400  # steps
SUSPICIOUS = 3.0  # robust z-score
SHARE = 0.01  # of the spike's height, that a document must move the loss by


@dataclass(frozen=True)
class Cause:
    """A document and what it did."""

    seen: Seen
    score: float  # how far its loss or gradient is from the others'
    # The step's loss less the loss without it; inf: without it the step is finite; None: it is a
    # suspect by its score, which the search did not test alone.
    effect: float | None


@dataclass(frozen=True)
class Findings:
    """What was found about a step."""

    step: int
    losses: dict[int, float]  # of the window's steps, trained again
    agreement: str  # of these losses with the run's record
    instances: list[Measured]
    causes: list[
        Cause
    ]  # the guilty, the largest effect first; then others, the highest score first
    threshold: float  # the smallest effect that makes a document guilty
    replayed: int  # steps, in all
    searched: int  # of these for the search
    tests: int  # groups that were left out
    is_complete: bool  # the budget was enough

    @property
    def guilty(self) -> list[Cause]:
        return [cause for cause in self.causes if is_guilty(cause, self.threshold)]


def find_causes(
    run: TrainedRun, step: int, first: int | None, budget: int, folder: Path
) -> Findings:
    """Train the steps before `step` again in `folder`, and find the documents that moved its loss.

    Args:
        first: first step of the window; by default that after the last checkpoint, but at most
            WINDOW steps before `step`.
        budget: steps that the search may train.

    Raises:
        ValueError: no such step, nothing to start from, or batches or documents are not known.
    """
    from olmo.inspect.window import Window

    if first is not None and not 1 <= first <= step:
        raise ValueError(f"--from: expected a step from 1 to {step}, found {first}")
    run.batch(step)  # raises for a step beyond the run
    start, place = find_start_checkpoint(run, first or step, folder / "start")
    first = first or max(start + 1, step - WINDOW)
    log.info(f"steps {start + 1} to {step}, from {place or 'the start'}")
    window = Window(run, first, step, place, folder)
    window.train()
    scores = dict(zip(window.seen, score(window.seen), strict=True))
    loss = window.losses[step]
    before = [window.losses[one] for one in range(first, step)]
    search = Search()
    effects: dict[Seen, float | None] = {}
    if math.isfinite(loss):
        height = loss - float(np.median(before or [loss]))
        threshold = SHARE * max(height, 0.05 * loss)
        own = [seen for seen in window.seen if seen.step == step]
        effects |= own_effects(own, len(window.batches[step][0]) * run.sequence_length)
    else:
        threshold = 0.5
        effects |= dict.fromkeys(find_non_finite(window), math.inf)
    if math.isfinite(loss) or not effects:
        earlier = [seen for seen in window.seen if seen.step < step]

        def effect(group: list[int]) -> float:
            found = window.loss_without([earlier[one] for one in group])
            if math.isfinite(loss):
                return loss - found if math.isfinite(found) else -math.inf
            return math.inf if math.isfinite(found) else 0.0

        search = find_guilty(
            group_by_step(earlier, scores),
            effect,
            lambda group: window.steps_without(earlier[one] for one in group),
            lambda one: scores[earlier[one]],
            threshold=threshold,
            suspicious=SUSPICIOUS,
            budget=budget,
        )
        effects |= {earlier[one]: moved for one, moved in search.effects.items()}
        effects |= {one: None for one in earlier if scores[one] > SUSPICIOUS and one not in effects}
    causes = [Cause(seen, scores[seen], moved) for seen, moved in effects.items()]
    return Findings(
        step=step,
        losses={one: window.losses[one] for one in range(first, step + 1)},
        agreement=compare_with_record(run, window, start, folder),
        instances=window.instances,
        causes=sorted(causes, key=lambda cause: rank(cause, threshold)),
        threshold=threshold,
        replayed=window.replayed,
        searched=search.spent,
        tests=search.tests,
        is_complete=search.is_complete,
    )


def is_guilty(cause: Cause, threshold: float) -> bool:
    """Whether a document moved the loss by more than ordinary ones."""
    return cause.effect is not None and cause.effect > threshold


def rank(cause: Cause, threshold: float) -> tuple[float, float]:
    """A sort key: small effects are noise, so documents with one are told apart by their score."""
    effect = cause.effect if cause.effect is not None and cause.effect > threshold else 0.0
    return -effect, -cause.score


def score(seen: list[Seen]) -> list[float]:
    """How far each document is from the others, in robust standard deviations.

    The larger one of two: of its loss above or below the median of its step, summed over its
    labels, for a long document moves the weights more; and of its instance's gradient norm.
    """
    steps = {one.step for one in seen}
    medians = {
        step: float(np.median([one.loss for one in seen if one.step == step])) for step in steps
    }
    excess = [one.labels * (one.loss - medians[one.step]) for one in seen]
    pairs = zip(robust_z(excess), robust_z([one.norm for one in seen]), strict=True)
    return [max(pair) for pair in pairs]


def robust_z(values: Iterable[float]) -> list[float]:
    """Distances from the median, in 1.4826 median absolute deviations; 1e6 of what is not finite.

    >>> robust_z([1.0, 2.0, 3.0, math.inf])
    [0.6744907594765952, 0.0, 0.6744907594765952, 1000000.0]
    """
    numbers = np.array(list(values))
    is_finite = np.isfinite(numbers)
    usable = numbers[is_finite] if is_finite.any() else np.zeros(1)
    far = np.abs(np.where(is_finite, numbers, 0.0) - np.median(usable))
    scale = 1.4826 * float(np.median(np.abs(usable - np.median(usable)))) or 1.0
    z: list[float] = np.where(is_finite, far / scale, 1e6).tolist()
    return z


def group_by_step(seen: list[Seen], scores: dict[Seen, float]) -> list[Group]:
    """The suspicious documents and the others, each by step, the most suspicious first."""
    order = sorted(range(len(seen)), key=lambda one: (seen[one].step, -scores[seen[one]]))
    groups: list[Group] = []
    for is_suspicious in (True, False):
        by_step: dict[int, list[int]] = {}
        for one in order:
            if (scores[seen[one]] > SUSPICIOUS) == is_suspicious:
                by_step.setdefault(seen[one].step, []).append(one)
        groups.append(list(by_step.values()))
    return groups


def own_effects(seen: list[Seen], tokens: int) -> dict[Seen, float]:
    """Of the documents of a step on its loss: the mean less the mean over all other labels.

    Both as the loss is recorded, (T - 1) / T of the mean: of the step's `tokens` the first of each
    instance is no label.
    """
    sums = np.array([one.labels * one.loss for one in seen])
    labels = np.array([one.labels for one in seen])
    total, count = float(sums.sum()), int(labels.sum())
    return {
        one: (total - (total - own) * count / max(count - one.labels, 1)) / tokens
        for one, own in zip(seen, sums.tolist(), strict=True)
    }


def find_non_finite(window: Window) -> list[Seen]:
    """The documents of the last step without which their instance would be finite."""
    broken = {
        row
        for row, one in enumerate(one for one in window.instances if one.step == window.last)
        if not (math.isfinite(one.loss) and math.isfinite(one.norm))
    }
    return [
        seen
        for seen in window.seen
        if seen.step == window.last
        and (rows := {row for row, *_ in seen.spans} & broken)
        and any(window.is_finite_without(seen, row) for row in rows)
    ]


def compare_with_record(run: TrainedRun, window: Window, start: int, folder: Path) -> str:
    """What the replayed losses say of data and code.

    Raises ValueError where they differ under the run's own conditions.
    """
    path = Path(run.folder if run.record else run.run_folder, "metrics.jsonl")
    recorded = read_step_metrics(path) if path.exists() else {}
    gaps = {
        step: abs(loss - recorded[step][LOSS])
        for step, loss in window.losses.items()
        if step in recorded and recorded[step][LOSS] != loss
    }
    known = sum(step in recorded for step in window.losses)
    if not gaps:
        return f"{known} steps, equal to the bit to the record" if known else "there is no record"
    here = training_conditions(read_segments(folder))
    there = training_conditions(merge_equal(run.segments, start, window.last))
    text = f"losses differ from the record by up to {max(gaps.values()):.3g}, from step {min(gaps)}"
    if here == there:
        raise ValueError(
            f"{text}, under the run's own conditions: its data, its code or its record changed "
            "since. `olmo store verify` checks the data"
        )
    return f"{text}; the run's conditions were {there}, and these are {here}"
