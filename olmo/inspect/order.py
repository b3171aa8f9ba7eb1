"""Which instances a run saw at a step, from a config, an order and a place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from olmo.config import TrainConfig
from olmo.data.order import fit_to_world_size, global_indices, total_size

ReadSlice = Callable[
    [int, int], np.ndarray
]  # a part of the stored order: (first, one past the last)


class SeenInstances:
    """The instances of a run in the order in which it saw them, while its config stayed the same.

    Args:
        cfg: the run's config; the order read is that of its `epoch`.
        n: how many instances its data holds.
        stored: how many numbers its order file holds: n, or what OLMo wrote, n fitted to the
            world size.
        read: reads a part of that file.
        world_size: of the run; it decides how an epoch ends (`order.total_size`), and who saw what.
        after: the step after which it began, or went on, with this config.
        epoch: that in which it did, counted from the config's.
        examples: how many instances of that epoch were behind it.
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
        worlds = [w for w in range(1, self.batch_size + 1) if self.batch_size % w == 0]
        drop_last = cfg.data.drop_last
        if stored != n and stored not in {total_size(n, w, drop_last) for w in worlds}:
            raise ValueError(
                f"expected an order of {n} instances, or that fitted to a number of processes that "
                f"divides global_train_batch_size={self.batch_size}, found {stored}: it belongs to "
                "other data, or another max_sequence_length"
            )
        # What OLMo wrote is fitted to its world size, which nobody may know any more.
        self.fitted = stored != n
        total = stored if self.fitted else total_size(n, world_size, drop_last)
        self.steps_per_epoch = total // self.batch_size
        self.after, self._epoch, self._examples = after, epoch, examples
        self._first_steps = max(total - examples, 0) // self.batch_size  # of that epoch

    def instances(self, step: int, rank: int | None = None) -> np.ndarray:
        """The instances of step 1, 2, …; (G,), or (G / W,) of one rank.

        Raises:
            ValueError: there is no such step or rank.
        """
        if step <= self.after:
            raise ValueError(f"expected a step from {self.after + 1} on, found {step}")
        epoch, start = self.place(step)
        found = self._part(epoch, start, start + self.batch_size)
        if rank is None:
            return found
        if not 0 <= rank < self.world_size:
            raise ValueError(f"expected a rank from 0 to {self.world_size - 1}, found {rank}")
        return found[rank :: self.world_size]

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, counted from the config's, and its first place in that order."""
        number = step - 1 - self.after
        if number < self._first_steps:
            return self._epoch, self._examples + number * self.batch_size
        later, number = divmod(number - self._first_steps, self.steps_per_epoch)
        return self._epoch + 1 + later, number * self.batch_size

    def when(self, instances: np.ndarray, last_step: int) -> Iterator[tuple[int, int, int]]:
        """(step, position in its batch, instance) of each time one of these was seen, in order."""
        step = self.after + 1
        while step <= last_step:
            epoch, start = self.place(step)
            first = epoch == self._epoch
            left = self._first_steps - (step - 1 - self.after) if first else self.steps_per_epoch
            steps = min(left, last_step + 1 - step)
            order = self._part(epoch, start, start + steps * self.batch_size)
            for place in np.flatnonzero(np.isin(order, instances)).tolist():
                more, position = divmod(place, self.batch_size)
                yield step + more, position, int(order[place])
            step += steps

    def _part(self, epoch: int, start: int, stop: int) -> np.ndarray:
        if epoch == 0 and (self.fitted or stop <= self.n):
            return self.read(start, stop)
        if self.fitted and self.steps_per_epoch != self._steps_of_world_size():
            raise ValueError(
                f"a step of epoch {epoch + 1} depends on the run's world size, and "
                f"{self.world_size} is not it: its order has another length; give --world-size"
            )
        seed = self.cfg.data_seed
        whole = (
            self.read(0, self.n)
            if epoch == 0
            else global_indices(self.n, seed, epoch + (self.cfg.epoch or 0))
        )
        return fit_to_world_size(whole, self.world_size, self.cfg.data.drop_last)[start:stop]

    def _steps_of_world_size(self) -> int:
        return total_size(self.n, self.world_size, self.cfg.data.drop_last) // self.batch_size


def parse_steps(text: str) -> range:
    """Steps as a user writes them: "5", or "5..9" with both ends.

    >>> list(steps_of("5..7")), list(steps_of("3"))
    ([5, 6, 7], [3])
    """
    first, _, last = text.partition("..")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise ValueError(f"expected steps as 5 or 5..9, found {text!r}")
    if not (steps := range(int(first), int(last or first) + 1)):
        raise ValueError(f"expected steps from the earlier to the later, as 5..9, found {text!r}")
    return steps
