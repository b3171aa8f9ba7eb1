"""A step's numbers come when they come: what is known of them, and when."""

from typing import Any

import pytest
import torch

from olmo.distributed.world import World
from olmo.train import metrics_buffer
from olmo.train.metrics_buffer import MetricsBuffer, NotFinite
from olmo.train.step import Losses

ALONE = World(0, 0, 1, torch.device("cpu"), "")


class Copy:
    """A device's event, of a copy that ends when it is told to."""

    def __init__(self, device: "Device") -> None:
        self._device, self.number = device, 0

    def record(self) -> None:
        self._device.copies += 1
        self.number = self._device.copies

    def query(self) -> bool:
        return self.number <= self._device.done

    def synchronize(self) -> None:
        self._device.waits += 1
        self._device.done = max(self._device.done, self.number)


class Device:
    """A device that is behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies = self.done = self.waits = 0
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Copy(self))


def add(numbers: MetricsBuffer, step: int, failed: float = 0.0, loss: float = 2.0) -> None:
    optim = {"total_grad_norm": torch.tensor(0.5 * step)}
    losses = Losses(torch.tensor(loss), torch.tensor(0.25))
    known = {"throughput/total_tokens": 8.0 * step}
    numbers.add(step, losses, torch.tensor(failed), optim, known, torch.tensor([step, step + 7]))


def test_they_arrive_in_order_and_nobody_waits(monkeypatch: pytest.MonkeyPatch):
    device, numbers = Device(monkeypatch), MetricsBuffer(ALONE)
    for step in (1, 2, 3):
        add(numbers, step)
        assert numbers.arrived() == []
    device.done = 2
    first, second = numbers.arrived()
    assert first[0] == 1 and second[0] == 2 and numbers.arrived() == []
    assert first[1] == {
        "train/CrossEntropyLoss": 2.0,
        "train/ZLoss": 0.25,
        "train/Perplexity": pytest.approx(7.389, abs=1e-3),
        "optim/total_grad_norm": 0.5,
        "throughput/total_tokens": 8.0,
    }
    assert device.waits == 0
    assert [step for step, _ in numbers.fetch(lambda *_: None)] == [3] and device.waits == 1
    assert numbers.fetch(lambda *_: None) == []


def test_what_was_not_finite_is_known_once_it_has_arrived(monkeypatch: pytest.MonkeyPatch):
    device, numbers = Device(monkeypatch), MetricsBuffer(ALONE)
    add(numbers, 1)
    add(numbers, 2, failed=1.0, loss=float("nan"))
    add(numbers, 3, failed=1.0)
    assert not numbers.failed
    written: list[Any] = []
    with pytest.raises(NotFinite, match=r"step 2: .*\[2, 9\]"):
        numbers.fetch(lambda step, metrics: written.append(step))
    assert written == [1], "what came before it is not lost"
    assert numbers.failed and numbers.arrived() == []

    device.done, numbers = 0, MetricsBuffer(ALONE)
    device.copies = 0
    add(numbers, 1, failed=1.0)
    assert numbers.arrived() == [] and not numbers.failed
    device.done = 1
    assert numbers.arrived() == [] and numbers.failed, "told, and raised by fetch on every process"
    assert metrics_buffer.NotFinite is NotFinite
