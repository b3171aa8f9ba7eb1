"""Which instances a run saw at a step: what its loader gives, from the order alone."""

import numpy as np
import pytest

from olmo.config import TrainConfig
from olmo.data import order
from olmo.data.batches import IterableDataset
from olmo.inspect.order import Seen, steps_of


def config(batch_size: int, drop_last: bool) -> TrainConfig:
    return TrainConfig.new(
        global_train_batch_size=batch_size, seed=11, data={"drop_last": drop_last}
    )


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("n", "batch_size", "world_size"), [(50, 8, 1), (51, 8, 4), (48, 6, 3)])
@pytest.mark.parametrize("fitted", [True, False])
def test_steps_are_what_the_loader_gives(n, batch_size, world_size, drop_last, fitted):
    cfg = config(batch_size, drop_last)
    stored = order.global_indices(n, 11)
    if fitted:  # as OLMo writes it
        stored = order.fit_to_world_size(stored, world_size, drop_last)
    seen = Seen(cfg, n, len(stored), lambda a, b: stored[a:b], world_size)
    for rank in range(world_size):
        dataset = IterableDataset(
            range(n),
            batch_size,
            seed=11,
            drop_last=drop_last,
            world_size=world_size,
            rank=rank,
        )
        each = batch_size // world_size
        for epoch in (0, 1):
            dataset.reshuffle(epoch)
            mine = dataset.rank_indices()
            for step in range(seen.steps_per_epoch):
                found = seen.instances(epoch * seen.steps_per_epoch + step + 1, rank)
                assert found.tolist() == mine[step * each : (step + 1) * each].tolist()


def test_what_does_not_fit_is_refused():
    stored = order.global_indices(50, 11)
    with pytest.raises(ValueError, match="expected an order of 51 instances"):
        Seen(config(8, True), 51, 50, lambda a, b: stored[a:b])
    with pytest.raises(ValueError, match="world size that divides"):
        Seen(config(8, True), 50, 50, lambda a, b: stored[a:b], world_size=3)
    seen = Seen(config(8, True), 50, 50, lambda a, b: stored[a:b], world_size=2)
    with pytest.raises(ValueError, match="rank from 0 to 1"):
        seen.instances(1, 2)
    with pytest.raises(ValueError, match="from 1 on"):
        seen.instances(0)
    assert steps_of("5..9") == range(5, 10) and steps_of("4") == range(4, 5)
    with pytest.raises(ValueError, match=r"expected steps as 5 or 5\.\.9"):
        steps_of("5-9")


def test_reading_a_step_reads_only_that_part_of_the_order():
    stored, read = order.global_indices(1000, 11), []

    def part(start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return stored[start:stop]

    assert Seen(config(8, True), 1000, 1000, part).instances(3).tolist() == stored[16:24].tolist()
    assert read == [(16, 24)]
