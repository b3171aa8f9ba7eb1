"""Schedules that OLMo's golden numbers do not cover."""

import pytest

from olmo.config import TrainConfig
from olmo.optim import (
    BoltOnWarmupScheduler,
    LinearWithWarmup,
    Scheduler,
    build_scheduler,
)


def build(**settings: object) -> Scheduler:
    return build_scheduler(TrainConfig.new(scheduler=settings))


def test_warmup_stable_decay() -> None:
    schedule = build(name="warmup_stable_decay", t_warmup=10, t_decay=20, alpha_f=0.0)
    rates = [schedule.get_lr(1.0, step, 100) for step in range(131)]
    assert rates[0] == 0.1 and rates[5] == pytest.approx(0.55)
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert set(rates[100:]) == {0.0}
    tenth = build(name="warmup_stable_decay", t_warmup=10, alpha_f=0.0)
    assert tenth.get_lr(1.0, 90, 100) == 1.0
    assert tenth.get_lr(1.0, 95, 100) == pytest.approx(0.5)
    earlier = build(name="warmup_stable_decay", t_warmup=10, t_decay=10, t_max=50, alpha_f=0.0)
    assert earlier.get_lr(1.0, 45, 100) == pytest.approx(0.5)
    assert earlier.get_lr(1.0, 50, 100) == 0.0


def test_warmup_stable_decay_that_is_longer_than_the_rest() -> None:
    schedule = build(name="warmup_stable_decay", t_warmup=10, t_decay=200, alpha_f=0.0)
    assert schedule.get_lr(1.0, 55, 100) == pytest.approx(0.5)
    everything = build(name="warmup_stable_decay", t_warmup=100, t_decay=50, alpha_f=0.0)
    assert everything.get_lr(1.0, 100, 100) == 0.0


@pytest.mark.parametrize("name", ["cosine_with_warmup", "linear_with_warmup"])
def test_warmup_longer_than_the_run(name: str) -> None:
    schedule = build(name=name, t_warmup=200, alpha_f=0.1)
    assert 0.1 < schedule.get_lr(1.0, 150, 100) < 1.0
    assert schedule.get_lr(1.0, 200, 100) == 0.1


def test_linear_as_olmos_users_build_it() -> None:
    schedule = LinearWithWarmup(
        grad_clip_warmup_steps=None,
        grad_clip_warmup_factor=None,
        warmup_min_lr=None,
        warmup_steps=2000,
    )
    assert schedule.get_lr(1.0, 0, 10_000) == pytest.approx(0.1)
    assert schedule.get_lr(1.0, 2000, 10_000) == 1.0
    assert schedule.get_lr(1.0, 10_000, 10_000) == pytest.approx(0.1)
    assert schedule.get_lr(1.0, 3000, 10_000) > schedule.get_lr(1.0, 5000, 10_000)


def test_bolt_on() -> None:
    inner = build(name="linear_with_warmup", t_warmup=1000, grad_clip_warmup_steps=10,
                  grad_clip_warmup_factor=3.0)  # fmt: skip
    bolted = BoltOnWarmupScheduler.wrap(inner, 5000, 6000)
    assert bolted.get_lr(1.0, 100, 11_000) == 0.0
    assert bolted.get_lr(1.0, 5500, 11_000) == pytest.approx(inner.get_lr(1.0, 6000, 11_000) / 2)
    assert bolted.get_lr(1.0, 7000, 11_000) == inner.get_lr(1.0, 7000, 11_000)
    assert bolted.get_max_grad_norm(1.0, 10, 100) == 3.0
    assert bolted.get_max_grad_norm(None, 10, 100) is None
