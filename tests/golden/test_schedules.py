"""Learning rates and clipping thresholds are OLMo's."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from olmo.config import TrainConfig
from olmo.optim import BoltOnWarmupScheduler, Scheduler, build_scheduler

CASES = json.loads((Path(__file__).parent / "schedules/lr.json").read_text())
FIELDS = [
    "t_warmup",
    "t_max",
    "alpha_f",
    "warmup_min_lr",
    "grad_clip_warmup_steps",
    "grad_clip_warmup_factor",
]


def build(case: dict[str, Any]) -> Scheduler:
    settings = {k: case[k] for k in FIELDS if k in case}
    if case["name"].startswith("bolt_on"):
        inner = build_scheduler(TrainConfig.new(scheduler=settings))
        return BoltOnWarmupScheduler.wrap(inner, 40, 60)
    if not case["name"].startswith("seed"):
        settings["name"] = case["name"]
    return build_scheduler(TrainConfig.new(scheduler=settings))


def test_every_case_is_known() -> None:
    others = {c["name"] for c in CASES if "warmup_min_lr" not in c}
    assert others == {"bolt_on(cosine_with_warmup,40,60)", "seed OLMo-250M"}


@pytest.mark.parametrize("case", [c for c in CASES if "lr" in c], ids=lambda c: c["name"])
def test_learning_rate_and_threshold(case: dict[str, Any]) -> None:
    scheduler, peak, end = build(case), case["initial_lr"], case["max_steps"]
    steps = case.get("steps", range(len(case["lr"])))
    found = [scheduler.get_lr(peak, i, end) for i in steps]
    assert found == pytest.approx(case["lr"], rel=1e-12, abs=1e-18)
    if "max_grad_norm" in case:
        expected = case["max_grad_norm"]
        for i in range(131):
            threshold = expected[i] if isinstance(expected, list) else expected
            assert scheduler.get_max_grad_norm(1.0, i, end) == threshold
            assert scheduler.get_max_grad_norm_ratio(1.0, i, end) == threshold


@pytest.mark.parametrize("case", [c for c in CASES if "error" in c], ids=lambda c: c["name"])
def test_no_warmup_where_olmo_divides_by_zero(case: dict[str, Any]) -> None:
    scheduler = build(case)
    rates = [scheduler.get_lr(case["initial_lr"], i, case["max_steps"]) for i in range(131)]
    assert rates[0] == rates[1] == case["initial_lr"]
    assert all(0 < b <= a for a, b in itertools.pairwise(rates))
