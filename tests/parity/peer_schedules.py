"""Runs in the peer's environment: learning rates and clipping thresholds of its schedules.

python peer_schedules.py CASES.json RESULTS.npz
"""

import json
import sys
from typing import Any

import numpy as np


def run(case: dict[str, Any], config_class: Any, optim: Any) -> dict[str, np.ndarray]:
    """The same code for both sides, given their TrainConfig and `olmo.optim`."""
    scheduler = optim.build_scheduler(config_class.new(scheduler=case["scheduler"]))
    if case["bolt_on"]:
        scheduler = optim.BoltOnWarmupScheduler.wrap(scheduler, *case["bolt_on"])
    points = [(case["peak"], now, case["end"]) for now in case["times"]]
    return {
        "lr": np.array([scheduler.get_lr(*point) for point in points]),
        "norm": np.array([scheduler.get_max_grad_norm(*point) for point in points]),
        "ratio": np.array([scheduler.get_max_grad_norm_ratio(*point) for point in points]),
    }


if __name__ == "__main__":
    import olmo.optim
    from olmo.config import TrainConfig

    with open(sys.argv[1]) as file:
        cases = json.load(file)
    found = [run(case, TrainConfig, olmo.optim) for case in cases]
    np.savez(sys.argv[2], **{f"{i}/{k}": v for i, out in enumerate(found) for k, v in out.items()})
