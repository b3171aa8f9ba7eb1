"""Which instances a run was trained on at a step, from a config, an order and a position in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from olmo.config import TrainConfig
from olmo.data.order import fit_to_world_size, global_indices, total_size

ReadSlice = Callable[
    [int, int], np.ndarray
]  # a part of the stored order: (first, one past the last)


class SeenInstances:
    """The instances of a run in training order, while its config stayed the same.

    Args:
        cfg: the run's config; `read` reads the order of its `epoch`.
        n: instances in its data.
        stored: numbers in its order file: n, or in OLMo's files n fitted to the world size; a
            mixture's has any number, and is all that the run has.
        read: reads a slice of that file.
        world_size: decides where an epoch ends (`order.total_size`), and which rank reads what.
        after: the step after which the run began, or continued, with this config.
        epoch: the epoch of that step, counted from the config's.
        examples: instances of that epoch that were trained before.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        n: int,
        stored: int,
        read: ReadSlice,
        world_size: int = 1,
        after: int = 0,
        epoch: int = 0,
        examples: int = 0,
    ) -> None:
        self.cfg, self.n, self.read, self.world_size = cfg, n, read, world_size
        self.batch_size = cfg.global_train_batch_size
        if self.batch_size % world_size:
            raise ValueError(
                f"expected a world size that divides global_train_batch_size={self.batch_size}, "
                f"found {world_size}"
            )
        worlds = (w for w in range(1, self.batch_size + 1) if self.batch_size % w == 0)
        fitted = {total_size(n, w, cfg.data.drop_last) for w in worlds}
        self.is_mixture = bool(cfg.data.mixture)
        if not (self.is_mixture or stored == n or stored in fitted):
            raise ValueError(
                f"expected an order of {n} instances, or one fitted to a number of processes that "
                f"divides global_train_batch_size={self.batch_size}, found {stored}: it belongs to "
                "other data, or to another max_sequence_length"
            )
        # OLMo's order files are fitted to the run's world size, which may not be known.
        self.is_fitted = self.is_mixture or stored != n
        total = stored if self.is_fitted else total_size(n, world_size, cfg.data.drop_last)
        self.steps_per_epoch = total // self.batch_size
        self.after, self._epoch, self._examples = after, epoch, examples
        self._first_steps = max(total - examples, 0) // self.batch_size  # of that epoch

    def instances(self, step: int, rank: int | None = None) -> np.ndarray:
        """The instances of a step, counted from 1: (G,), or (G / W,) of one rank.

        Raises ValueError if there is no such step or rank.
        """
        if step <= self.after:
            raise ValueError(f"expected a step from {self.after + 1} on, found {step}")
        epoch, start = self.locate(step)
        batch = self._slice(epoch, start, start + self.batch_size)
        if rank is None:
            return batch
        if not 0 <= rank < self.world_size:
            raise ValueError(f"expected a rank from 0 to {self.world_size - 1}, found {rank}")
        return batch[rank :: self.world_size]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, counted from the config's, and where its batch begins in there."""
        number = step - 1 - self.after
        if number < self._first_steps:
            return self._epoch, self._examples + number * self.batch_size
        later, number = divmod(number - self._first_steps, self.steps_per_epoch)
        return self._epoch + 1 + later, number * self.batch_size

    def find(self, instances: np.ndarray, last_step: int) -> Iterator[tuple[int, int, int]]:
        """(step, position in its batch, instance) of each use of one of these, in order."""
        step = self.after + 1
        while step <= last_step:
            epoch, start = self.locate(step)
            is_first = epoch == self._epoch
            left = self._first_steps - (step - 1 - self.after) if is_first else self.steps_per_epoch
            steps = min(left, last_step + 1 - step)
            order = self._slice(epoch, start, start + steps * self.batch_size)
            for index in np.flatnonzero(np.isin(order, instances)).tolist():
                offset, position = divmod(index, self.batch_size)
                yield step + offset, position, int(order[index])
            step += steps

    def _slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        if self.is_mixture and epoch > 0:
            raise ValueError("expected a step of the run's mixture, found one after its end")
        if epoch == 0 and (self.is_fitted or stop <= self.n):
            return self.read(start, stop)
        if self.is_fitted and self.steps_per_epoch != self._steps_of_world_size():
            raise ValueError(
                f"a step of epoch {epoch + 1} depends on the run's world size, and the length of "
                f"its order does not fit {self.world_size} processes; give --world-size"
            )
        seed = self.cfg.data_seed
        order = (
            self.read(0, self.n)
            if epoch == 0
            else global_indices(self.n, seed, epoch + (self.cfg.epoch or 0))
        )
        return fit_to_world_size(order, self.world_size, self.cfg.data.drop_last)[start:stop]

    def _steps_of_world_size(self) -> int:
        return total_size(self.n, self.world_size, self.cfg.data.drop_last) // self.batch_size
