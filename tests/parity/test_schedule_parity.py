"""Learning rates and clipping thresholds of random schedules, in steps and in tokens."""

import os
import random
from typing import Any

import numpy as np
import pytest
from peer_schedules import run

import olmo.optim
from olmo.config import TrainConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("OLMO_PEER_PYTHON"),
        reason="OLMO_PEER_PYTHON is not set; see tests/parity/README.md",
    ),
]
NAMES = [
    "cosine_with_warmup",
    "linear_with_warmup",
    "inverse_sqrt_with_warmup",
    "max_scheduler",
    "constant",
    "cosine_linear_envelope",
    "constant_with_warmup",
]


def random_case(seed: int) -> dict[str, Any]:
    r = random.Random(seed)
    unit = r.choice([1, 4096, 4_194_304])  # one step in steps, or in tokens
    name = NAMES[seed % len(NAMES)]
    # Theirs divides by zero without a warm-up where it falls as 1/sqrt(step).
    least = 1 if name in ("inverse_sqrt_with_warmup", "max_scheduler") else 0
    end = r.randint(50, 3000)
    peak = r.choice([1e-4, 3e-4, 7.4487e-5, 1.0, 6e-4])
    scheduler = {
        "name": name,
        "t_warmup": r.choice([least, r.randint(1, 100), float(r.randint(1, 2 * end))]) * unit,
        "t_max": r.choice([None, end * unit, 0.5 * end * unit, 5e12]),
        "alpha_f": r.choice([0, 0.1, 0.25, 1.0]),
        "warmup_min_lr": r.choice([None, 0.0, peak / 7]),
        "grad_clip_warmup_steps": r.choice([None, 10 * unit, 33.7 * unit]),
        "grad_clip_warmup_factor": r.choice([None, 5.0, 10]),
    }
    start = r.randint(1, end)
    return {
        "scheduler": scheduler,
        "bolt_on": r.choice([None, None, [start * unit, (start + r.randint(1, 50)) * unit]]),
        "peak": peak,
        "end": end * unit,
        "times": [step * unit for step in range(end + 20)],
    }


CASES = [random_case(seed) for seed in range(int(os.environ.get("OLMO_PARITY_CASES", 70)))]


def test_the_same_rates_and_thresholds(theirs) -> None:
    expected = theirs("peer_schedules.py", CASES)
    for i, case in enumerate(CASES):
        for key, value in run(case, TrainConfig, olmo.optim).items():
            np.testing.assert_allclose(
                value, expected[f"{i}/{key}"], rtol=1e-12, atol=1e-18, err_msg=f"{key} of {case}"
            )
