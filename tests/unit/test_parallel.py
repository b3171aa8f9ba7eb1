"""Several processes: the same numbers as one, the same data at any number, and none left over."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import metrics, read_until, run, same, start, state

from olmo.train.parallel import TIMEOUT


def finish(folder: Path, processes: int, code: int = 0, **changes: Any) -> str:
    process = start(folder, processes, **changes)
    said, _ = process.communicate(timeout=TIMEOUT.total_seconds())
    assert process.returncode == code, said
    return said


def rows(run_folder: Path) -> dict[int, set[int]]:
    """Step → the instances that all processes together computed."""
    found: dict[int, set[int]] = {}
    for lines in state(run_folder)["indices"]:
        for line in lines.decode().splitlines():
            step, *instances = map(int, line.split("\t"))
            found.setdefault(step, set()).update(instances)
    return found


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_duration": 20, "eval_interval": 10}
    assert run(tmp_path, save_folder=str(tmp_path / "one"), **changes) == 0
    said = finish(tmp_path, 2, save_folder=str(tmp_path / "two"), **changes)
    assert "2 replicas, gradients averaged" in said
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["step"] for m in one] == [m["step"] for m in two]
    for name in ("train/CrossEntropyLoss", "optim/total_grad_norm", "eval/heldout/Perplexity"):
        a, b = ([m[name] for m in lines if name in m] for lines in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


@pytest.mark.slow
def test_resumed_equals_straight_on_two(tmp_path: Path) -> None:
    finish(tmp_path, 2, save_folder=str(tmp_path / "straight"))
    changes: dict[str, Any] = {"save_folder": str(tmp_path / "resumed")}
    finish(tmp_path, 2, code=1, stop_after=7, **changes)
    finish(tmp_path, 2, try_load_latest_save=True, **changes)
    assert same(state(tmp_path / "straight"), state(tmp_path / "resumed"))


@pytest.mark.slow
def test_the_data_goes_on_at_another_number_of_processes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluators": [], "save_folder": str(tmp_path / "changing")}
    assert run(tmp_path, evaluators=[]) == 0
    finish(tmp_path, 2, code=1, stop_after=3, **changes)
    assert run(tmp_path, stop_after=3, try_load_latest_save=True, **changes) == 75
    finish(tmp_path, 2, try_load_latest_save=True, **changes)
    losses = [
        [m["train/CrossEntropyLoss"] for m in metrics(tmp_path / name)[1:]]
        for name in ("run", "changing")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_when_one_dies_all_are_gone(tmp_path: Path, victim: str) -> None:
    process = start(tmp_path, 2, max_duration=100_000, save_interval_unsharded=None)
    read_until(process, lambda line: line.startswith("step") and " 10/" in line)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1] if victim == "a rank" else process.pid, 9)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/status").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a process of the run is left after ten seconds"
        time.sleep(0.1)
    process.communicate(timeout=30)
    assert process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, fsdp",
    [
        (2, {"wrapping_strategy": None}),
        (2, {"wrapping_strategy": "by_block", "sharding_strategy": "SHARD_GRAD_OP"}),
        (4, {"sharding_strategy": "HYBRID_SHARD", "hybrid_sharding_num_model_replicas": 2}),
    ],
    ids=["FSDP2", "FSDP2-blocks", "HSDP"],
)  # fmt: skip
def test_sharded_computes_what_one_does(
    tmp_path: Path, processes: int, fsdp: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {"max_duration": 20, "activation_checkpointing": "one_in_two"}
    assert run(tmp_path, save_folder=str(tmp_path / "one"), **changes) == 0
    changes |= {"distributed_strategy": "fsdp", "fsdp": fsdp}
    finish(tmp_path, processes, save_folder=str(tmp_path / "many"), **changes)
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    for name in ("train/CrossEntropyLoss", "optim/total_grad_norm", "eval/heldout/Perplexity"):
        a, b = ([m[name] for m in lines if name in m] for lines in (one, many))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sharded_resumed_equals_straight(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"distributed_strategy": "fsdp", "precision": "amp_bf16"}
    finish(tmp_path, 2, save_folder=str(tmp_path / "straight"), **changes)
    changes |= {"save_folder": str(tmp_path / "resumed")}
    finish(tmp_path, 2, code=1, stop_after=7, **changes)
    finish(tmp_path, 2, try_load_latest_save=True, **changes)
    assert same(state(tmp_path / "straight"), state(tmp_path / "resumed"))
