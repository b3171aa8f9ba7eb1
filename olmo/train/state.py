"""Where a run is, and how far it goes. With weights and optimizer state this is all that a resumed
run needs: everything else follows from its config and its step, so that its bits are the same."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from olmo.config import TrainConfig


def every(step: int, interval: int | None) -> bool:
    """Whether something that is due every `interval` steps is due now; never without one."""
    return interval is not None and step % interval == 0


@dataclass
class TrainState:
    """Steps, and the place in the data. The names are OLMo's."""

    global_step: int = 0
    epoch: int = 0
    global_train_examples_seen_this_epoch: int = 0
    global_train_tokens_seen: int = 0

    @classmethod
    def from_checkpoint(cls, train: dict[str, Any], cfg: TrainConfig) -> TrainState:
        """From the contents of train.pt; older versions of OLMo keep less there."""
        step = int(train["global_step"])
        data_step = train.get("global_data_step", step)
        examples = train.get("global_train_examples_seen", data_step * cfg.global_train_batch_size)
        tokens = data_step * cfg.global_train_batch_size * cfg.model.max_sequence_length
        return cls(
            global_step=step,
            epoch=int(train.get("epoch") or 0),
            global_train_examples_seen_this_epoch=int(
                train.get("global_train_examples_seen_this_epoch", examples)
            ),
            global_train_tokens_seen=int(train.get("global_train_tokens_seen", tokens)),
        )

    def state_dict(self, world_size: int) -> dict[str, Any]:
        """The contents of train.pt; OLMo reads the three lists, which are always empty here."""
        lists = ("checkpoints", "unsharded_checkpoints", "ephemeral_checkpoints")
        return {**asdict(self), "world_size": world_size, **{name: [] for name in lists}}

    def advance(self, batch_size: int, tokens: int) -> int:
        """Count one more step, of `batch_size` instances and `tokens` over all processes."""
        self.global_step += 1
        self.global_train_examples_seen_this_epoch += batch_size
        self.global_train_tokens_seen += tokens
        return self.global_step

    def begin_epoch(self, epoch: int) -> None:
        """At its first instance."""
        self.epoch, self.global_train_examples_seen_this_epoch = epoch, 0

    def batches_left(self, total_size: int, batch_size: int) -> int:
        """Whole batches that are left of this epoch of `total_size` instances.

        Counted from the place in it, over all processes: a run that is resumed with another batch
        size may be anywhere in an epoch.
        """
        return max(total_size - self.global_train_examples_seen_this_epoch, 0) // batch_size


@dataclass(frozen=True)
class RunLength:
    """How much a step takes, and at which step a run ends."""

    batch_size: int  # instances of a step, over all processes
    tokens_per_step: int  # over all processes
    max_steps: int  # max_duration; the scheduler counts towards it
    max_tokens: int  # the same in tokens
    end: int  # max_duration, or stop_at where that comes first: the run is finished
    last_step: int  # `end`, or stop_after this start where that comes first

    @classmethod
    def of(cls, cfg: TrainConfig, state: TrainState, total_size: int) -> RunLength:
        """From a state on, with `total_size` instances an epoch.

        Raises:
            ValueError: max_duration is neither steps, tokens ("2e9T") nor epochs ("1ep").
        """
        batch_size = cfg.global_train_batch_size
        tokens_per_step = batch_size * cfg.model.max_sequence_length
        max_steps, max_tokens = duration(cfg, state, tokens_per_step, total_size)
        end = min(max_steps, cfg.stop_at or max_steps)
        last = end if cfg.stop_after is None else min(end, state.global_step + cfg.stop_after)
        return cls(batch_size, tokens_per_step, max_steps, max_tokens, end, last)


def duration(
    cfg: TrainConfig, state: TrainState, tokens_per_step: int, total_size: int
) -> tuple[int, int]:
    """max_duration in steps and in tokens, both from the run's first step on.

    Epochs count from cfg.epoch and end where the data does: an epoch's remaining batches are
    counted from the state, which another batch size or world size may have led to.

    Raises:
        ValueError: max_duration is neither steps, tokens ("2e9T") nor epochs ("1ep").
    """
    length, unit = cfg.duration
    step, seen = state.global_step, state.global_train_tokens_seen
    if unit == "tokens":
        return step + math.ceil(max(length - seen, 0) / tokens_per_step), length
    if unit == "epochs":
        batch_size = cfg.global_train_batch_size
        more = length - 1 - max(state.epoch - (cfg.epoch or 0), 0)
        left = state.batches_left(total_size, batch_size) + more * (total_size // batch_size)
        return step + max(left, 0), seen + max(left, 0) * tokens_per_step
    return length, seen + max(length - step, 0) * tokens_per_step
