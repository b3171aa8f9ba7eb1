"""Some steps of a finished run, trained again in this process, with any documents left out.

The steps before are trained as they were. Of each step of the window the documents are measured at
the weights that it began with, and the state is kept, so that a later question need not begin at
the checkpoint. A document is left out of a step as `data.label_mask_paths` does it: its tokens are
still read, and are no labels.

With more than one process, this process trains the whole batch, rank by rank and so in the run's
microbatches where these divide a rank's share. Only the order of the sum over them differs.

Shapes: G instances of a step, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo.config import DistributedStrategy
from olmo.data.batches import get_labels, select_model_inputs
from olmo.distributed.world import join_world
from olmo.inspect.documents import Document, TokenShard, find_token_shards, require_shard
from olmo.inspect.replay import build_replay_config
from olmo.inspect.run import TrainedRun
from olmo.optim.optimizer import compute_norms
from olmo.precision.autocast import autocast_context
from olmo.store.stage import current_store
from olmo.train.loop import train_step
from olmo.train.setup import Training, set_up
from olmo.train.state import TrainState
from olmo.train.step import clear_gradients, forward_backward

KEPT_BYTES = 4 << 30  # of states between the steps of a window; beyond, only some are kept


@dataclass(frozen=True)
class Seen:
    """A document as a step saw it: its tokens in instances of the step's batch."""

    step: int
    document: Document
    spans: tuple[tuple[int, int, int], ...]  # (row of the batch, first token, one past its last)
    labels: int  # its tokens that count
    loss: float  # their mean, at the weights that the step began with
    norm: float  # of the gradient of its instance's mean loss; of several the largest


@dataclass(frozen=True)
class Measured:
    """An instance of a step, at the weights that the step began with."""

    step: int
    position: int  # in the step's global batch
    index: int  # in the data set
    loss: float  # mean of its labels
    norm: float  # of the gradient of that


@dataclass(frozen=True)
class Kept:
    """What a step begins with, as copies in the host's memory."""

    tensors: list[Tensor]  # parameters, masters and buffers
    optimizer: list[dict[str, tuple[Any, Any]]]  # of each parameter: name → value, its device
    groups: list[dict[str, Any]]  # rates and thresholds
    state: TrainState

    @classmethod
    def of(cls, run: Training) -> Kept:
        states = [
            {name: _copy(value) for name, value in run.optimizer.state.get(p, {}).items()}
            for p in _parameters(run)
        ]
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "param_names")}
            for group in run.optimizer.param_groups
        ]
        tensors = [t.detach().to("cpu", copy=True) for t in _tensors(run)]
        return cls(tensors, states, groups, replace(run.state))

    @torch.no_grad()
    def restore(self, run: Training) -> None:
        for tensor, kept in zip(_tensors(run), self.tensors, strict=True):
            tensor.copy_(kept)
        run.optimizer.state.clear()
        for p, state in zip(_parameters(run), self.optimizer, strict=True):
            if state:
                run.optimizer.state[p] = {
                    name: value if device is None else value.to(device, copy=True)
                    for name, (value, device) in state.items()
                }
        for group, kept_group in zip(run.optimizer.param_groups, self.groups, strict=True):
            group.update(kept_group)
        run.state = replace(self.state)
        run.failed = torch.zeros_like(run.failed)
        run.optimizer.found_inf = None


def _copy(value: Any) -> tuple[Any, Any]:
    """A value of an optimizer's state and its device; what is no tensor is never changed."""
    if not torch.is_tensor(value):
        return value, None
    return value.detach().to("cpu", copy=True), value.device


def _parameters(run: Training) -> list[Any]:
    return [p for group in run.optimizer.param_groups for p in group["params"]]


def _tensors(run: Training) -> list[Tensor]:
    return list(dict.fromkeys([*run.model.parameters(), *run.model.buffers(), *_parameters(run)]))


class Window:
    """The steps `first` to `last` of a run, ready to be trained again from a checkpoint.

    Raises:
        ValueError: the batches are not known, or their documents are not in the store.
    """

    def __init__(
        self, run: TrainedRun, first: int, last: int, start: Path | None, folder: Path
    ) -> None:
        self.run, self.first, self.last = run, first, last
        self._shards = find_token_shards(current_store())
        self._tables: dict[str, tuple[np.ndarray, np.ndarray, Any]] = {}
        self.batches = {step: self._find_batch(step) for step in range(first, last + 1)}
        self.documents = {step: self._find_documents(step) for step in self.batches}
        cfg = build_replay_config(run, start, folder)
        if cfg.use_msamp or cfg.fp8 is not None:
            raise ValueError(
                f"{run.where}: expected weights and states in 16 or 32 bits, found 8: what its "
                "scales were is not kept between steps; olmo inspect shows the documents"
            )
        single = cfg.distributed_strategy == DistributedStrategy.single
        self.training: Training = set_up(cfg, join_world(None, cfg.single if single else None))
        self.losses: dict[int, float] = {}
        self.instances: list[Measured] = []
        self.seen: list[Seen] = []
        self.replayed = 0  # steps
        self._kept: dict[int, Kept] = {}  # at the beginning of a step

    # --- what the steps saw ---------------------------------------------------------------------

    def _find_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The (G,) instances of a step, rank by rank, and their positions in its batch."""
        batch, size = self.run.batch(step)
        positions = np.concatenate([np.arange(rank, len(batch), size) for rank in range(size)])
        return batch[positions], positions

    def _find_documents(self, step: int) -> dict[Document, list[tuple[int, int, int]]]:
        """The documents of a step and their spans (`Seen`)."""
        length = self.run.sequence_length
        found: dict[Document, list[tuple[int, int, int]]] = {}
        for row, index in enumerate(self.batches[step][0].tolist()):
            path, number = self.run.locate(index)
            shard, begin = require_shard(path, self._shards), number * length
            starts, ends, table = self._table(shard)
            here = range(
                np.searchsorted(ends, begin, "right"),
                np.searchsorted(starts, begin + length, "left"),
            )
            for n in here:
                span = (row, max(int(starts[n]) - begin, 0), min(int(ends[n]) - begin, length))
                found.setdefault(shard.document(table.row(n, named=True)), []).append(span)
        return found

    def _table(self, shard: TokenShard) -> tuple[np.ndarray, np.ndarray, Any]:
        """Where a shard's documents start and end, and the table of them."""
        if shard.sha256 not in self._tables:
            table = shard.read_table()
            table = table.filter(table["start"] < table["end"])
            starts, ends = table["start"].to_numpy(), table["end"].to_numpy()
            self._tables[shard.sha256] = starts, ends, table
        return self._tables[shard.sha256]

    # --- training -------------------------------------------------------------------------------

    def train(self) -> None:
        """Train up to the last step, as the run did, and measure the window's documents."""
        run = self.training
        run.model.train()
        every = self._states_apart()
        while (step := run.state.global_step + 1) < self.last:
            if step >= self.first:
                self._measure(step)
                if (step - self.first) % every == 0:
                    self._kept[step] = Kept.of(run)
            self.losses[step] = self._train_step(step, ())
        self._measure(self.last)
        self._kept[self.last] = Kept.of(run)
        self.losses[self.last] = self._last_loss(())

    def loss_without(self, left_out: Iterable[Seen]) -> float:
        """The last step's loss if documents had been left out of the steps that saw them.

        It is not finite either if its gradient is not.
        """
        without = list(left_out)
        first = min(seen.step for seen in without)
        self._kept[max(step for step in self._kept if step <= first)].restore(self.training)
        while (step := self.training.state.global_step + 1) < self.last:
            self._train_step(step, without)
        return self._last_loss(without)

    def steps_without(self, left_out: Iterable[Seen]) -> int:
        """How many steps `loss_without` trains, the last one included."""
        first = min(seen.step for seen in left_out)
        return self.last + 1 - max(step for step in self._kept if step <= first)

    def _states_apart(self) -> int:
        size = 3 * sum(p.numel() * p.element_size() for p in self.training.model.parameters())
        return max(math.ceil(size * (self.last - self.first + 1) / KEPT_BYTES), 1)

    def _load(self, step: int, left_out: Iterable[Seen] = ()) -> dict[str, Any]:
        indices = self.batches[step][0] if step in self.batches else self._find_batch(step)[0]
        batch = self.training.loader.load_batch(indices)
        spans = [span for seen in left_out if seen.step == step for span in seen.spans]
        if spans:
            mask = batch.get("label_mask", torch.ones_like(batch["input_ids"], dtype=torch.bool))
            for row, first, end in spans:
                mask[row, first:end] = False
            batch["label_mask"] = mask
        return batch

    def _train_step(self, step: int, left_out: Iterable[Seen]) -> float:
        run, batch = self.training, self._load(step, left_out)
        run.state.advance(len(batch["index"]), batch["input_ids"].numel())
        losses, _ = train_step(run, batch)
        self.replayed += 1
        return float(losses.ce)

    def _last_loss(self, left_out: Iterable[Seen]) -> float:
        run, batch = self.training, self._load(self.last, left_out)
        clear_gradients(run.optimizer, run.cfg)
        losses = forward_backward(run.model, batch, run.cfg, run.world.device, self.last)
        norm = self._norm()
        self.replayed += 1
        return float(losses.ce) if math.isfinite(norm) else math.nan

    def is_finite_without(self, seen: Seen, row: int) -> bool:
        """Whether an instance of the last step has a finite loss and gradient without a document.

        Without: end-of-text tokens, which are no labels, are in its place.
        """
        batch = self._load(self.last, [seen])
        for other, first, end in seen.spans:
            batch["input_ids"][other, first:end] = self.training.cfg.model.eos_token_id
        losses, norm = self.measure_instance(batch, row)
        return math.isfinite(norm) and not np.isinf(losses).any()

    # --- measuring ------------------------------------------------------------------------------

    def _measure(self, step: int) -> None:
        """The loss of each token of a step, and the norm of each instance's gradient."""
        batch, (indices, positions) = self._load(step), self.batches[step]
        rows = []
        for row in range(len(indices)):
            losses, norm = self.measure_instance(batch, row)
            counts = ~np.isnan(losses)
            mean = float(losses[counts].mean()) if counts.any() else 0.0
            place = int(positions[row]), int(indices[row])
            self.instances.append(Measured(step, *place, mean, norm))
            rows.append((losses, norm))
        for document, spans in self.documents[step].items():
            of = np.concatenate([rows[row][0][first:end] for row, first, end in spans])
            labels = int((~np.isnan(of)).sum())
            if labels:
                loss, norm = float(np.nanmean(of)), max(rows[row][1] for row, *_ in spans)
                self.seen.append(Seen(step, document, tuple(spans), labels, loss, norm))

    def measure_instance(self, batch: dict[str, Any], row: int) -> tuple[np.ndarray, float]:
        """The (T,) losses of an instance's tokens, NaN where one is no label; the gradient's norm.

        A loss that is not finite is inf.
        """
        run, device = self.training, self.training.world.device
        one = {
            name: value[row : row + 1].to(device)
            if torch.is_tensor(value)
            else value[row : row + 1]
            for name, value in batch.items()
            if name != "index"
        }
        labels = get_labels(one)  # (1, T)
        clear_gradients(run.optimizer, run.cfg)
        run.model.eval()
        with autocast_context(run.cfg, device):
            logits = run.model(**select_model_inputs(one)).logits
        losses = F.cross_entropy(logits[0].float(), labels[0], ignore_index=-100, reduction="none")
        counts = labels[0] != -100
        if counts.any():
            losses[counts].mean().backward()
        norm = self._norm()
        run.model.train()
        own = np.full(len(losses), np.nan)
        values = losses.detach().double().cpu().numpy()[:-1]
        at = counts.cpu().numpy()[:-1]
        own[1:][at] = np.where(np.isfinite(values[at]), values[at], np.inf)
        return own, norm

    def _norm(self) -> float:
        """The norm of all gradients, which are cleared."""
        run = self.training
        found = [p.grad for p in _parameters(run) if p.grad is not None]
        norm = float(compute_norms(found).square().sum().sqrt()) if found else 0.0
        clear_gradients(run.optimizer, run.cfg)
        return norm
